"""Everything one run needs, built in the order in which a mistake is cheapest to find: data, tokeniser, model."""

import dataclasses
import logging
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nemo_jepo.actor.actor import DTYPES, MegatronJEPOActor
from nemo_jepo.actor.model import load_hf_config
from nemo_jepo.actor.optimizer import optimizer_kind, require_same_kind
from nemo_jepo.actor.parallel import Layout
from nemo_jepo.actor.weights.load import load_stage, open_source
from nemo_jepo.checkpoint.format import is_checkpoint, latest_checkpoint
from nemo_jepo.checkpoint.writer import CheckpointWriter, RunState, load_checkpoint, read_loop_state
from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.layouts import check_layout
from nemo_jepo.config.schema import Config
from nemo_jepo.data import PromptStream, load_prompts, load_tokenizer, train_tokenizer, training_texts
from nemo_jepo.data.dataset import Split
from nemo_jepo.data.splice import Splicer
from nemo_jepo.objective.records import UpdateRule
from nemo_jepo.rewards.verify import Verifier
from nemo_jepo.rollout.build import OwnServers, open_sampler
from nemo_jepo.rollout.sampler import Sampler, SamplersLost
from nemo_jepo.types import Prompt, Rollout

log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Rooms:
    """The rooms of one run on this rank."""

    config: Config
    rule: UpdateRule
    layout: Layout
    tokenizer: PreTrainedTokenizerBase
    splicer: Splicer
    stream: PromptStream
    validation: tuple[Prompt, ...]
    """Empty without a validation file."""
    actor: MegatronJEPOActor
    sampler: Sampler | None
    """On the first rank of each replica; the others are told what it drew."""
    verifier: Verifier
    """Its process starts when first asked, on replica heads."""
    checkpoints: CheckpointWriter
    servers: tuple[tuple[str, ...], str] | None = None
    """Addresses and key of the run's vLLM servers, for a judge that shares them."""
    sampler_version: int = -1
    """Optimizer steps in the sampler's weights, known on every rank."""
    begun: "dict[int, Future[list[Rollout]]]" = field(default_factory=dict)
    """Rollouts by the step that trains on them, on replica heads; more than one with rollout.max_staleness."""

    sampler_counts: dict[str, float] = field(default_factory=dict)
    """`Sampler.counts` of this replica when it was last asked for rollouts, on every rank."""

    def own_share(self, batch: Sequence[Prompt]) -> Sequence[Prompt]:
        """This replica's prompts of a global batch."""
        size = len(batch) // self.layout.data_parallel_size
        return batch[size * self.layout.data_parallel_rank :][:size]

    def close(self) -> None:
        """End what runs beside this process: requests, connections, the verifier."""
        for future in self.begun.values():
            future.cancel()
        if self.sampler is not None:
            self.sampler.close()


def update_rule(config: Config) -> UpdateRule:
    """The objective's settings as the objective room takes them."""
    objective = dataclasses.asdict(config.objective)
    objective.pop("sft_target")
    return UpdateRule(
        **objective,
        **dataclasses.asdict(config.advantage),
        kl_beta=config.kl.beta,
        kl_estimator=config.kl.estimator,
    )


def find_tokenizer(config: Config, folder: Path) -> PreTrainedTokenizerBase:
    """The tokeniser of the config, or one trained on the training texts into <folder>/tokenizer (rank 0 trains)."""
    path = config.tokenizer.path or config.pretrained_checkpoint.restore_from_path
    if path is None:
        path = str(folder / "tokenizer")
        if torch.distributed.get_rank() == 0 and not Path(path).exists():
            texts = [config.answer.marker.capitalize(), *training_texts(config.data)]
            train_tokenizer(texts, config.tokenizer.train_vocab_size, Path(path))
        torch.distributed.barrier()
    return load_tokenizer(path)


def find_hf_config(config: Config, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The model's shape, checked against the layout and the tokeniser."""
    source = config.model.hf_config or config.model.hf_config_path or config.pretrained_checkpoint.restore_from_path
    assert source is not None, "settings.check asks for one"
    hf_config = load_hf_config(source)
    check_layout(config.model, hf_config.to_dict())
    if len(tokenizer) > hf_config.vocab_size:
        raise ConfigError(
            "vocab_size", hf_config.vocab_size, f"the tokeniser has {len(tokenizer)} tokens", "Raise it to that"
        )
    hf_config.dtype = DTYPES[config.trainer.precision]
    if config.pretrained_checkpoint.restore_from_path is None:
        hf_config.eos_token_id, hf_config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        hf_config.bos_token_id = tokenizer.bos_token_id
    return hf_config


def load_initial_weights(actor: MegatronJEPOActor, config: Config, layout: Layout) -> None:
    """Weights of a Hugging Face folder, of a checkpoint in any layout, or seeded random ones."""
    path = config.pretrained_checkpoint.restore_from_path
    if path is not None and is_checkpoint(Path(path)):
        state = load_checkpoint(Path(path), {"model": actor.sharded_weights()})
        actor.load_weights(state.sharded["model"])
        return
    source = open_source(actor.hf_config, path, config.model.seed)
    load_stage(actor.chunks, actor.hf_config, source, layout)


def load_data(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """Training and validation prompts; rows that were skipped are listed in the log."""
    splits: list[tuple[Prompt, ...]] = []
    training: Split = "warmup" if config.objective.name == "sft" else "train"
    for split in (training, "validation"):
        if split == "validation" and config.data.name != "arithmetic" and config.data.validation_path is None:
            splits.append(())
            continue
        dataset = load_prompts(config.data, split, tokenizer)
        for row in dataset.bad_rows[:20]:
            log.warning("skipped: %s", row)
        if dataset.bad_rows:
            log.warning("%s: %d bad rows skipped, %d used", split, len(dataset.bad_rows), len(dataset.prompts))
        splits.append(dataset.prompts)
    return splits[0], splits[1]


def build_rooms(config: Config, folder: Path, layout: Layout, servers: OwnServers) -> Rooms:
    """Build a run's rooms; the actor holds its initial weights, also as reference policy, and no optimizer yet.

    Args:
        config, folder, layout: of this run.
        servers: those that the run starts itself, which outlive these rooms.
    Raises:
        ConfigError, DataError: something the user must change; found before the model is built where possible.
    """
    tokenizer = find_tokenizer(config, folder)
    train, validation = load_data(config, tokenizer)
    splicer = Splicer(tokenizer, config.answer)
    hf_config = find_hf_config(config, tokenizer)
    servers.start(config, layout, hf_config, tokenizer)
    actor = MegatronJEPOActor(hf_config, config.model, config.trainer.precision, layout)
    load_initial_weights(actor, config, layout)
    if config.kl.beta > 0 and config.objective.name != "sft":
        actor.keep_reference_policy()
    sampler = None
    if layout.is_replica_head:
        sampler = open_sampler(config, layout, hf_config, tokenizer, splicer.stop_after, servers)
    return Rooms(
        config=config,
        rule=update_rule(config),
        layout=layout,
        tokenizer=tokenizer,
        splicer=splicer,
        stream=PromptStream(train, config.trainer.jepo.num_prompts_per_step, config.data.shuffle, config.data.seed),
        validation=validation,
        actor=actor,
        sampler=sampler,
        verifier=Verifier(config.evaluation.verify_timeout_s),
        checkpoints=checkpoint_writer(config, folder, hf_config, tokenizer),
        servers=servers.addresses,
    )


def collect(rooms: Rooms, future: "Future[list[Rollout]] | None") -> list[Rollout]:
    """Rollouts that the replica's first rank waits for, on every rank of the replica; all ranks of the world call.

    Raises:
        SamplersLost: on every rank, where any replica has no server left.
    """
    drawn, lost, counts = None, "", {}
    if rooms.sampler is not None and future is not None:
        try:
            drawn = future.result()
        except SamplersLost as error:
            lost = str(error)
        counts = rooms.sampler.counts()
    drawn, lost, rooms.sampler_counts = rooms.layout.share_in_replica((drawn, lost, counts))
    if rooms.layout.any_over_world(bool(lost)):
        raise SamplersLost(lost or "another replica has no server left")
    return drawn


def checkpoint_writer(
    config: Config, folder: Path, hf_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> CheckpointWriter:
    """The writer of the run's checkpoints, each with what another run needs to start from it."""

    def write_model_files(path: Path) -> None:
        hf_config.save_pretrained(path)
        tokenizer.save_pretrained(path)

    loop = config.trainer.jepo
    return CheckpointWriter(folder / "checkpoints", loop.keep_checkpoints, write_model_files, loop.async_save)


def run_state(rooms: Rooms) -> RunState:
    """What a checkpoint holds: weights, optimizer, schedule, data position."""
    kind = optimizer_kind(rooms.config.model.optim, rooms.config.trainer.precision)
    loop_state = {"data": rooms.stream.state_dict(), "optimizer": kind, "scores_in_bf16": rooms.actor.scores_in_bf16}
    return RunState(rooms.actor.sharded_state_dict(), loop_state)


def save(rooms: Rooms, step: int, last: bool) -> None:
    """A checkpoint of the run, unless it has one of this step; all ranks.

    Args:
        last: the run ends here, so every checkpoint is whole on return; others may stay in the background.
    """
    rooms.checkpoints.save(step, lambda: run_state(rooms), last)


def resume(rooms: Rooms, folder: Path) -> int:
    """Take up the run's newest whole checkpoint, if there is one; all ranks.

    Returns:
        Steps done so far.
    Raises:
        ConfigError: the checkpoint holds another kind of optimizer.
    """
    path = latest_checkpoint(folder / "checkpoints")
    if path is None:
        return 0
    kind = optimizer_kind(rooms.config.model.optim, rooms.config.trainer.precision)
    require_same_kind(path, read_loop_state(path).get("optimizer"), kind)
    state = rooms.checkpoints.resume(path, rooms.actor.sharded_state_dict(is_loading=True))
    rooms.actor.load_state_dict(state.sharded)
    rooms.actor.scores_in_bf16 = state.loop.get("scores_in_bf16", False)  # an older checkpoint does not say
    rooms.stream.load_state_dict(state.loop["data"])
    return rooms.actor.num_steps
