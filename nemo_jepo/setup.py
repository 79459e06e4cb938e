"""Everything one run needs, built in the order in which a mistake is cheapest to find: data, tokenizer, model."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nemo_jepo.actor.actor import DTYPES, MegatronJEPOActor
from nemo_jepo.actor.model import load_hf_config
from nemo_jepo.actor.optimizer import optimizer_kind, require_same_kind
from nemo_jepo.actor.parallel import Layout, on_first_rank
from nemo_jepo.actor.weights.checksums import compared
from nemo_jepo.actor.weights.load import load_stage, open_source
from nemo_jepo.checkpoint.format import is_checkpoint, latest_checkpoint
from nemo_jepo.checkpoint.writer import CheckpointWriter, RunState, load_checkpoint, read_loop_state
from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.layouts import check_layout
from nemo_jepo.config.objectives import ObjectiveKind
from nemo_jepo.config.schema import (
    AdvantageConfig,
    Config,
    DataConfig,
    DPOConfig,
    KLConfig,
    LoopConfig,
    ModelConfig,
    ObjectiveConfig,
)
from nemo_jepo.config.sources import require_folders, with_commits, with_folders
from nemo_jepo.data.curriculum import order_of
from nemo_jepo.data.dataset import PromptSplits, has_split, training_texts
from nemo_jepo.data.splice import Splicer
from nemo_jepo.data.stream import PromptStream
from nemo_jepo.data.tokenizer import load_tokenizer, train_tokenizer
from nemo_jepo.data.verdict import VerdictWriter
from nemo_jepo.grading import Grader, JudgementReward, Reward, RuleReward
from nemo_jepo.lessons import Lessons
from nemo_jepo.objective.records import UpdateRule
from nemo_jepo.refill import Refill
from nemo_jepo.rewards.judgement import JudgementVerifier
from nemo_jepo.rewards.task import TaskScorer
from nemo_jepo.rewards.verify import Verifier
from nemo_jepo.rollout.build import OwnServers, open_sampler, share_gpus, training_request
from nemo_jepo.rollout.queue import RolloutQueue
from nemo_jepo.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """The parts of one run on this rank. What changes while it trains is inside the parts."""

    config: Config
    objective: ObjectiveKind
    rule: UpdateRule
    layout: Layout
    tokenizer: PreTrainedTokenizerBase
    splicer: Splicer
    stream: PromptStream
    validation: tuple[Prompt, ...]
    """Empty without a validation file."""
    actor: MegatronJEPOActor
    rollouts: RolloutQueue
    verifier: Grader
    """Its process starts when first asked, on replica heads."""
    reward: Reward
    """What own answers earn."""
    checkpoints: CheckpointWriter
    verdicts: VerdictWriter | None = None
    """Asks samples about their own answers, where the run does so (self_verification.weight)."""
    refill: Refill | None = None
    """Drops prompts and draws others, where the run does so (refill.max_batches)."""
    lessons: Lessons | None = None
    """What a step shows of its prompts, where the next ones depend on it (data.drop_easy, data.sampler)."""
    servers: tuple[tuple[str, ...], str] | None = None
    """Addresses and key of the run's vLLM servers, for a judge that shares them."""

    def upcoming(self, ahead: int = 0) -> Sequence[Prompt]:
        """This replica's prompts of the batch that is so many ahead."""
        return prompts_of_replica(self.stream.upcoming(ahead), self.layout)

    def close(self) -> None:
        """End what runs beside this process: requests, connections."""
        self.rollouts.close()


def prompts_of_replica(batch: Sequence[Prompt], layout: Layout) -> Sequence[Prompt]:
    """The part of a global batch that this replica trains on."""
    size = len(batch) // layout.data_parallel_size
    return batch[size * layout.data_parallel_rank :][:size]


def update_rule(
    objective: ObjectiveConfig,
    advantage: AdvantageConfig,
    kl: KLConfig,
    dpo: DPOConfig | None = None,
    verdict_weight: float = 0.0,
) -> UpdateRule:
    """objective.*, advantage.*, kl.*, dpo.* and self_verification.weight as the objective takes them."""
    settings = dataclasses.asdict(objective) | dataclasses.asdict(advantage)
    for not_the_updates in ("sft_target", "reward"):
        settings.pop(not_the_updates)
    dpo = dpo or DPOConfig()
    settings |= {"kl_beta": kl.beta, "kl_estimator": kl.estimator, "verdict_weight": verdict_weight}
    settings |= {"pair_beta": dpo.beta, "reject_longest": dpo.reject_longest, "unverifiable": dpo.unverifiable}
    return UpdateRule(**settings)


def find_models(config: Config, folder: Path) -> tuple[Config, Config]:
    """The settings with the commit of every name of the hub, and with its folder here, which lacks weights; all ranks.

    Args:
        folder: of the run, which keeps the commits that it began with.
    """

    def look_up() -> tuple[Config, Config]:
        named = with_commits(config, folder, has_saved=latest_checkpoint(folder / "checkpoints") is not None)
        return named, with_folders(named)

    named, local = on_first_rank(look_up)
    if local != named:
        require_folders(local)
    return named, local


def find_tokenizer(
    path: str | None, folder: Path, data: DataConfig, marker: str, vocab_size: int
) -> PreTrainedTokenizerBase:
    """The tokenizer of a path, or (None) one trained on the training texts into the folder, by rank 0; all ranks call.

    Args:
        path: a Hugging Face folder or a checkpoint.
        folder: where a trained one goes, and is found by the next start.
        data: how prompts are written, and with the marker what it is trained on.
        vocab_size: of a trained one.
    """
    if path is not None:
        return load_tokenizer(path, data.use_chat_template)
    if torch.distributed.get_rank() == 0 and not folder.exists():
        train_tokenizer([marker.capitalize(), *training_texts(data)], vocab_size, folder)
    torch.distributed.barrier()
    return load_tokenizer(str(folder))


def find_hf_config(
    model: ModelConfig, restored: str | None, precision: str, tokenizer: PreTrainedTokenizerBase
) -> PretrainedConfig:
    """The model's shape, checked against the layout and the tokenizer.

    Args:
        restored: what the weights come from, which knows its own shape; None for random ones.
    """
    source = model.hf_config or model.hf_config_path or restored
    assert source is not None, "config.check asks for one"
    hf_config = load_hf_config(source)
    check_layout(model, hf_config.to_dict())
    if len(tokenizer) > hf_config.vocab_size:
        raise ConfigError(
            "vocab_size", hf_config.vocab_size, f"the tokenizer has {len(tokenizer)} tokens", "Raise it to that"
        )
    hf_config.dtype = DTYPES[precision]
    if restored is None:
        hf_config.eos_token_id, hf_config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        hf_config.bos_token_id = tokenizer.bos_token_id
    ends = hf_config.eos_token_id if isinstance(hf_config.eos_token_id, list) else [hf_config.eos_token_id]
    if tokenizer.eos_token_id not in ends:  # servers would not stop there
        hf_config.eos_token_id = [tokenizer.eos_token_id, *(end for end in ends if end is not None)]
    return hf_config


def load_initial_weights(actor: MegatronJEPOActor, path: str | None, seed: int, verify: str) -> None:
    """Weights of a Hugging Face folder, of a checkpoint in any layout, or (path None) seeded random ones.

    Args:
        verify: checkpoint.verify_on_load.
    """
    if path is not None and is_checkpoint(Path(path)):
        state = load_checkpoint(Path(path), {"model": actor.sharded_weights()}, verify)
        actor.load_weights(state.sharded["model"])
        return
    source, layout = open_source(actor.hf_config, path, seed), actor.layout
    with nullcontext() if path is None else compared(Path(path), verify, layout.rank, layout.world_size):
        load_stage(actor.chunks, actor.hf_config, source, layout)


def build(config: Config, folder: Path, layout: Layout, servers: OwnServers, splits: PromptSplits) -> Trainer:
    """Build a run; the actor holds its initial weights, also as reference policy, and no optimizer yet.

    Args:
        config, folder, layout: of this run.
        servers: those that the run starts itself, which outlive it.
        splits: prompts that an earlier part of the same run has loaded.
    Raises:
        ConfigError, DataError: something the user must change; found before the model is built where possible.
    """
    objective, loop, precision = config.objective.kind, config.trainer.jepo, config.trainer.precision
    config, local = find_models(config, folder)
    restored = local.pretrained_checkpoint.restore_from_path

    # Data, and all that can be wrong without a model
    vocab_size = config.tokenizer.train_vocab_size
    path = local.tokenizer.path or restored
    tokenizer = find_tokenizer(path, folder / "tokenizer", config.data, config.answer.marker, vocab_size)
    prompts_of = functools.partial(splits.get, config.data, tokenizer=tokenizer, answer=config.answer)
    train = prompts_of("warmup" if objective.supervised else "train")
    validation = prompts_of("validation") if has_split(config.data, "validation") else ()
    if config.data.verifier == "judgement":
        validation = whole_pairs(validation)
    prompts, size = train or validation, loop.num_prompts_per_step
    stream = PromptStream(prompts, size, order_of(config.data, prompts, size, layout.data_parallel_size))
    splicer = Splicer(tokenizer, config.answer)
    hf_config = find_hf_config(config.model, restored, precision, tokenizer)
    if local != config:
        on_first_rank(lambda: with_folders(config, weights=True))

    # The model, while the servers start
    servers.start(config, layout, hf_config, tokenizer)
    actor = MegatronJEPOActor(hf_config, config.model, precision, layout)
    load_initial_weights(actor, restored, config.model.seed, config.checkpoint.verify_on_load)
    if config.keeps_sampler_policy:
        actor.keep_sampler_policy()
    if config.keeps_reference_policy:
        actor.keep_reference_policy(samplers=config.reference_is_samplers)

    # What samples
    sampler = None
    if layout.is_replica_head:
        sampler = open_sampler(config, layout, hf_config, tokenizer, splicer.stop_after, servers)
    rollouts = RolloutQueue(
        sampler,
        layout,
        request_for=lambda number: training_request(
            config.rollout, loop.num_generations_per_prompt, seed=config.data.seed + 1 + number
        ),
        upcoming=lambda ahead: prompts_of_replica(stream.upcoming(ahead), layout),
        max_staleness=config.rollout.max_staleness,
        num_batches=None if config.refill.max_batches > 1 else loop.max_steps,
        shared=share_gpus(config, actor, layout, sampler),
    )
    verifier = open_verifier(config)
    rule = update_rule(config.objective, config.advantage, config.kl, config.dpo, config.self_verification.weight)
    return Trainer(
        config=config,
        objective=objective,
        rule=rule,
        layout=layout,
        tokenizer=tokenizer,
        splicer=splicer,
        stream=stream,
        validation=validation,
        actor=actor,
        rollouts=rollouts,
        verifier=verifier,
        reward=reward_of(config, RuleReward(verifier, splicer, layout), servers.addresses),
        checkpoints=checkpoint_writer(loop, folder / "checkpoints", hf_config, tokenizer),
        verdicts=verdict_writer(config, tokenizer),
        refill=Refill(config.refill) if config.refill.max_batches > 1 and not objective.supervised else None,
        lessons=Lessons(rule, layout) if config.data.learns else None,
        servers=servers.addresses,
    )


def whole_pairs(prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
    """The prompts without one whose partner data.num_validation_prompts has cut off."""
    keys = Counter(prompt.group_key for prompt in prompts)
    return tuple(prompt for prompt in prompts if keys[prompt.group_key] == 2)


def open_verifier(config: Config) -> Grader:
    """What grades own answers (data.verifier)."""
    if config.data.verifier == "judgement":
        return JudgementVerifier()
    return task_scorer(config) if config.data.verifier == "task" else Verifier(config.evaluation.verify_timeout_s)


def reward_of(config: Config, rule: RuleReward, run_servers: tuple[Sequence[str], str] | None) -> Reward:
    """What own answers earn (objective.reward, dpo.unverifiable). Modules that ask a model load HTTP, and are imported
    where one is asked."""
    if config.data.verifier == "judgement":
        return JudgementReward(rule.splicer)
    reward: Reward = rule
    folder, kind = Path(config.exp_manager.exp_dir), config.objective.kind
    if config.objective.reward == "hybrid":
        from nemo_jepo.hybrid import HybridReward

        reward = HybridReward(config.hybrid, rule, kind.reads_likelihood, folder, run_servers)
    if kind.compares_pairs and config.dpo.unverifiable == "score":
        from nemo_jepo.pair_scores import ScoreReward

        reward = ScoreReward(config.dpo.judge, reward, rule.splicer, rule.layout, folder, run_servers)
    return reward


def verdict_writer(config: Config, tokenizer: PreTrainedTokenizerBase) -> VerdictWriter | None:
    """What asks samples about their own answers; None where nothing does (self_verification.weight=0).

    Raises:
        ConfigError: a sequence would no longer fit into a row.
    """
    if not config.self_verification.weight or config.objective.kind.supervised:
        return None
    writer = VerdictWriter(tokenizer, config.self_verification)
    generated = max(config.rollout.max_tokens, config.evaluation.max_tokens or 0)
    longest, room = config.data.max_prompt_tokens + generated + writer.num_tokens, config.model.tokens_per_micro_batch
    if longest > room:
        rule = f"with {writer.num_tokens} tokens of it a sequence may have {longest}, a row {room}"
        fix = "Raise model.tokens_per_micro_batch, or ask in fewer words"
        raise ConfigError("self_verification.question", config.self_verification.question, rule, fix)
    return writer


def task_scorer(config: Config) -> TaskScorer:
    """The scorer of data.task."""
    return TaskScorer(str(config.data.task), config.data.task_args, config.evaluation.verify_timeout_s)


def checkpoint_writer(
    loop: LoopConfig, folder: Path, hf_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> CheckpointWriter:
    """The writer of the run's checkpoints, each with what another run needs to start from it."""

    def write_model_files(path: Path) -> None:
        hf_config.save_pretrained(path)
        tokenizer.save_pretrained(path)

    return CheckpointWriter(folder, loop.keep_checkpoints, write_model_files, loop.async_save)


def save(t: Trainer, step: int, last: bool) -> None:
    """A checkpoint of the run, unless it has one of this step: weights, optimizer, schedule, data position; all ranks.

    Args:
        last: the run ends here, so every checkpoint is whole on return; others may stay in the background.
    """

    def state() -> RunState:
        kind = optimizer_kind(t.config.model.optim, t.config.trainer.precision)
        loop = {"data": t.stream.state_dict(), "optimizer": kind, "scores_in_bf16": t.actor.scores_in_bf16}
        if t.refill is not None:
            loop["refill"] = t.refill.state_dict()
        sharded = t.actor.sharded_state_dict()
        if is_between_syncs(t):
            sharded["sampler_policy"] = t.actor.sharded_sampler_policy()
            loop["sampler_policy_step"] = t.actor.sampler_policy_step
        return RunState(sharded, loop)

    t.checkpoints.save(step, state, last)


def is_between_syncs(t: Trainer) -> bool:
    """Whether the samplers have weights that are neither the trainer's own nor those that a start begins with."""
    interval = t.config.rollout.sync_interval
    return interval is not None and t.config.keeps_sampler_policy and t.actor.num_steps % interval != 0


def resume(t: Trainer, path: Path | None) -> int:
    """Take up a checkpoint of the run, if there is one; all ranks.

    Returns:
        Steps done so far.
    Raises:
        ConfigError: the checkpoint is damaged, or holds another kind of optimizer.
    """
    if path is None:
        return 0
    kind = optimizer_kind(t.config.model.optim, t.config.trainer.precision)
    loop = read_loop_state(path)
    require_same_kind(path, loop.get("optimizer"), kind)
    shards, verify = t.actor.sharded_state_dict(is_loading=True), t.config.checkpoint.verify_on_load
    offline = t.config.rollout.sync_interval is None
    sampler_policy_step = loop.get("sampler_policy_step") if t.config.keeps_sampler_policy and not offline else None
    if sampler_policy_step is not None:
        shards["sampler_policy"] = t.actor.sharded_sampler_policy()
    state = t.checkpoints.resume(path, shards, verify)
    t.actor.load_state_dict(state.sharded)
    if sampler_policy_step is not None:
        t.actor.load_sampler_policy(state.sharded["sampler_policy"], sampler_policy_step)
    elif not offline:
        t.actor.sampler_policy_step = None  # the first sync is of these weights
    t.actor.scores_in_bf16 = state.loop.get("scores_in_bf16", False)  # an older checkpoint does not say
    t.stream.load_state_dict(state.loop["data"])
    if t.refill is not None and "refill" in state.loop:
        t.refill.load_state_dict(state.loop["refill"])
    return t.actor.num_steps
