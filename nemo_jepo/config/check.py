"""Every rule of the settings, checked before a model is built.

`check_fields` walks the tree and checks what each field declares (config.rules); `check` checks the rules between
settings, files and machines, with those of the update in `config.check_update`. Both raise ConfigError for the first
broken rule, under the key that the user typed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from nemo_jepo.config.check_update import (
    check_evaluation,
    check_objective,
    check_on_policy,
    check_pair_scores,
    check_reward,
    check_self_verification,
)
from nemo_jepo.config.data import WORKED_TASKS
from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.layouts import check_fp8_settings, check_layout
from nemo_jepo.config.parts import in_part, stages_of
from nemo_jepo.config.reading import reason
from nemo_jepo.config.rules import Rule, plain_fault, rules_of
from nemo_jepo.config.schema import (
    ArithmeticConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ExpManagerConfig,
    ModelConfig,
    ObjectiveConfig,
    PretrainedConfig,
    RolloutConfig,
    TrainerConfig,
    WarmupConfig,
)
from nemo_jepo.config.shapes import model_shape


def check_fields(node: Any, prefix: str = "") -> None:
    """The declared rules of every field below `node`, a dataclass of settings whose key is `prefix` without its dot.

    After them, what holds for every setting: numbers are finite and of 64 bits, texts are texts (`rules.plain_fault`).
    """
    kinds = get_type_hints(type(node))
    for declared in fields(node):
        key, value = f"{prefix}{declared.name}", getattr(node, declared.name)
        if not _is_of(kinds[declared.name], value):  # ${...} may stand for anything in the place of a section
            raise ConfigError(key, value, f"must be {_named(kinds[declared.name])}", "Set what is in it")
        if is_dataclass(kinds[declared.name]):
            check_fields(value, f"{key}.")
            continue
        for place, section in enumerate(value if _holds_sections(kinds[declared.name]) else ()):
            check_fields(section, f"{key}[{place}].")
        for rule in rules_of(declared):
            if value is not None and not _holds(rule, key, value):
                raise ConfigError(key, value, f"must be {rule.text}", rule.fix)
        for inner, leaf in _leaves(key, value):
            if (fault := plain_fault(leaf)) is not None:
                raise ConfigError(inner, leaf, *fault)


def _is_of(kind: Any, value: Any) -> bool:
    """Whether a value is of a declared type, as far as sections, lists and mappings go."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    holders = tuple(get_origin(it) or it for it in kinds)
    nested = is_dataclass(value) or isinstance(value, (list, dict))
    return kind is Any or isinstance(value, holders) or not (nested or any(map(is_dataclass, holders)))


def _holds_sections(kind: Any) -> bool:
    """Whether a declared type is a list of sections."""
    return get_origin(kind) is list and is_dataclass(get_args(kind)[0])


def _named(kind: Any) -> str:
    return "a section of settings" if is_dataclass(kind) else f"of the type {kind}"


def _holds(rule: Rule, key: str, value: Any) -> bool:
    try:
        return rule.holds(value)
    except (OSError, ValueError) as error:  # no file system has such a path
        raise ConfigError(key, value, f"cannot be looked up ({reason(error)})", rule.fix) from error


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(key, value) of everything inside lists and free-form mappings, their keys too; else the value itself."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield key, name
            yield from _leaves(f"{key}.{name}", inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _leaves(key, inner)
    else:
        yield key, value


def check(config: Config, world_size: int, trains: bool = True) -> None:
    """Every rule between settings, files and machines.

    Args:
        world_size: trainer processes that were really started.
        trains: False where held-out prompts alone are read.
    Raises:
        ConfigError: the first broken rule.
    """
    _check_data(config.data, trains)
    _check_task(config)
    _check_judgements(config)
    _check_arithmetic(config.data.arithmetic)
    _check_machines(config.trainer, config.model, world_size)
    _check_batches(config.trainer, config.warmup, config.model.data_parallel_size(world_size))
    _check_lengths(config.model, config.rollout, config.evaluation, config.data)
    _check_steps(config)
    _check_until(config)
    _check_curriculum(config)
    check_objective(config.objective, config.kl, config.rollout, config.trainer)
    check_on_policy(config.objective, config.rollout)
    _check_shared_gpus(config.rollout, config.trainer, config.model)
    _check_sampler(config.rollout, config.objective, config.trainer)
    check_evaluation(config.evaluation, config.rollout, trains)
    check_reward(config.objective, config.hybrid, config.rollout)
    check_pair_scores(config)
    check_self_verification(config, trains)
    check_fp8_settings(config.model, config.trainer.precision)
    _check_model(config.model, config.pretrained_checkpoint)
    _check_loggers(config.exp_manager)
    for part in stages_of(config):
        with in_part(part.folder):
            check_fields(part.config)
            check(part.config, world_size, trains)


def _check_data(data: DataConfig, trains: bool) -> None:
    if trains and data.reads_files and data.train_path is None:
        raise ConfigError("data.train_path", None, f"data={data.name} reads a file", "Add data.train_path=FILE")
    if not trains and data.reads_files and data.validation_path is None:
        raise ConfigError("data.validation_path", None, "evaluate reads it", "Add data.validation_path=FILE")
    if data.system_prompt is not None and not data.use_chat_template:
        rule = "is a turn of the chat template"
        raise ConfigError("data.system_prompt", data.system_prompt, rule, "Add data.use_chat_template=true")


def _check_task(config: Config) -> None:
    data = config.data
    if data.name != "reasoning_gym":
        if data.verifier == "task":
            rule, fix = f"data={data.name} has no scorer of its own", "Use math, or data=reasoning_gym"
            raise ConfigError("data.verifier", "task", rule, fix)
        return
    if find_spec("reasoning_gym") is None:
        rule, fix = "needs the package reasoning-gym", "pip install 'nemo_jepo[tasks]'"
        raise ConfigError("data", "reasoning_gym", rule, fix)
    if data.task is None:
        raise ConfigError("data.task", None, "data=reasoning_gym needs one", "Add data.task=chain_sum")
    targets = {"objective.sft_target": config.objective.sft_target} if config.objective.kind.supervised else {}
    if config.warmup.max_steps:
        targets["warmup.sft_target"] = config.warmup.sft_target
    for key, target in targets.items():
        if target == "chain_of_thought" and data.task not in WORKED_TASKS:
            rule = f"data.task={data.task} has no golden chains of thought; {' and '.join(WORKED_TASKS)} have"
            raise ConfigError(key, target, rule, "Use marked_answer")


def _check_judgements(config: Config) -> None:
    """Rows that are tied together, and judgements, which are read in pairs."""
    data = config.data
    pairs_are_generated = data.name == "arithmetic" and data.arithmetic.answers == "judgement"
    if pairs_are_generated and data.verifier != "judgement":
        rule, fix = "makes prompts that ask for judgements", "Use data.verifier=judgement data.group_key=group with it"
        raise ConfigError("data.arithmetic.answers", "judgement", rule, fix)
    if data.group_key is not None and data.name != "jsonl" and not pairs_are_generated:
        rule, fix = f"is a field of rows of data=jsonl, and data={data.name} has none", "Leave it out"
        raise ConfigError("data.group_key", data.group_key, rule, fix)
    if data.group_key is not None and data.learns:
        rule = "keeps rows together that data.drop_easy or data.sampler would draw apart"
        raise ConfigError("data.group_key", data.group_key, rule, "Leave one of them out")
    if data.group_key is not None and config.refill.max_batches > 1:
        rule = "keeps rows together of which refill.max_batches would drop one"
        raise ConfigError("data.group_key", data.group_key, rule, "Use refill.max_batches=1")
    if data.verifier != "judgement":
        return
    if data.group_key is None:
        rule = "reads the two judgements of a pair together"
        raise ConfigError("data.verifier", "judgement", rule, "Name the pair's field, data.group_key=group")
    if config.objective.reward != "rule":
        rule = "asks a model about answers, and data.verifier=judgement has judgements"
        raise ConfigError("objective.reward", config.objective.reward, rule, "Use rule")


def _check_arithmetic(arithmetic: ArithmeticConfig) -> None:
    both = arithmetic.right_share + arithmetic.corrupted_share
    if both > 1:
        rule = "must be at most 1; the rest has no chain of thought"
        raise ConfigError("data.arithmetic.right_share + corrupted_share", both, rule, "Lower one of them")
    if arithmetic.shortest > arithmetic.num_steps:
        rule = f"no chain has more than {arithmetic.num_steps} steps (data.arithmetic.num_steps)"
        raise ConfigError("data.arithmetic.min_steps", arithmetic.min_steps, rule, "Lower it, or null")
    if arithmetic.corrupted_steps > arithmetic.shortest:
        rule = f"the shortest chain has {arithmetic.shortest} steps"
        raise ConfigError("data.arithmetic.corrupted_steps", arithmetic.corrupted_steps, rule, "Lower it")


def _check_machines(trainer: TrainerConfig, model: ModelConfig, world_size: int) -> None:
    asked = trainer.num_nodes * trainer.devices
    if asked != world_size:
        fix = f"Start {asked} processes (torchrun --nnodes --nproc-per-node), or change one of the two"
        raise ConfigError("trainer.num_nodes * trainer.devices", asked, f"{world_size} processes were started", fix)
    if model.sequence_parallel and model.tensor_model_parallel_size == 1:
        rule = "shards activations over the tensor-parallel ranks, and model.tensor_model_parallel_size is 1"
        raise ConfigError("model.sequence_parallel", True, rule, "Switch it off, or raise the tensor-parallel size")


def _check_batches(trainer: TrainerConfig, warmup: WarmupConfig, replicas: int) -> None:
    batches = {"trainer.jepo.num_prompts_per_step": trainer.jepo.num_prompts_per_step}
    if warmup.max_steps:
        batches["warmup.num_prompts_per_step"] = warmup.num_prompts_per_step
    for key, prompts in batches.items():
        if prompts % replicas:
            rule = f"must be a multiple of the {replicas} data-parallel replicas"
            raise ConfigError(key, prompts, rule, f"Use {max(1, prompts // replicas) * replicas}")


def _check_lengths(model: ModelConfig, rollout: RolloutConfig, evaluation: EvaluationConfig, data: DataConfig) -> None:
    generated = max(rollout.max_tokens, evaluation.max_tokens or 0)
    longest = generated + data.max_prompt_tokens + data.max_answer_tokens
    if -(-longest // model.segment_multiple) * model.segment_multiple > model.tokens_per_micro_batch:
        key = "max(rollout.max_tokens, evaluation.max_tokens) + data.max_prompt_tokens + data.max_answer_tokens"
        rule = f"a sequence must fit in a row of model.tokens_per_micro_batch={model.tokens_per_micro_batch}"
        raise ConfigError(key, longest, rule, "Raise that, or lower one of the three")


def _check_steps(config: Config) -> None:
    if config.trainer.jepo.max_steps == config.warmup.max_steps == 0 and not config.stages:
        rule = "makes the warm-up alone, and warmup.max_steps is 0 as well"
        raise ConfigError("trainer.jepo.max_steps", 0, rule, "Raise one of them")


def _check_until(config: Config) -> None:
    """A metric that ends a run must be measured on its way, and have a bound."""
    until, key = config.trainer.jepo.until, "trainer.jepo.until.metric"
    bounded = until.at_least is not None or until.at_most is not None
    if until.metric is None:
        if bounded:
            raise ConfigError(key, None, "there is a bound without a metric", "Name one, such as val_rollouts/accuracy")
        return
    if not bounded:
        raise ConfigError(key, until.metric, "has no bound", "Give at_least, at_most or both beside it")
    if not until.metric.startswith("val_"):
        return
    if config.data.reads_files and config.data.validation_path is None:
        raise ConfigError(key, until.metric, "nothing is validated on", "Add data.validation_path=FILE")
    if not config.trainer.jepo.val_check_interval:
        rule = "is measured at the end alone, because trainer.jepo.val_check_interval is 0"
        raise ConfigError(key, until.metric, rule, "Raise that")


def _check_curriculum(config: Config) -> None:
    """Who chooses prompts by what was learnt, can."""
    data = config.data
    known = data.name == "jsonl" or (data.name == "arithmetic" and data.cluster_key == "num_steps")
    if data.cluster_key is not None and (data.sampler == "uniform" or not known):
        rule = "is read by data.sampler=learning_progress, of rows of data=jsonl, or num_steps of data=arithmetic"
        raise ConfigError("data.cluster_key", data.cluster_key, rule, "Leave it out, or set both")
    if not data.learns:
        return
    key, value = ("data.drop_easy", data.drop_easy) if data.sampler == "uniform" else ("data.sampler", data.sampler)
    if data.sampler != "uniform" and data.drop_easy is not None:
        rule = "leaves prompts out of the next epochs, and data.sampler=learning_progress has none"
        raise ConfigError("data.drop_easy", data.drop_easy, rule, "Choose one of the two")
    if config.objective.kind.supervised:
        rule = f"reads samples, and objective={config.objective.name} draws none"
        raise ConfigError(key, value, rule, "Leave it out")
    if config.rollout.max_staleness:
        rule = "chooses a batch by what the one before it has shown, and rollout.max_staleness samples ahead"
        raise ConfigError(key, value, rule, "Use rollout.max_staleness=0, or leave it out")


def _check_sampler(rollout: RolloutConfig, objective: ObjectiveConfig, trainer: TrainerConfig) -> None:
    name, kind = rollout.name, rollout.kind
    truncated = {"rollout.top_p": (rollout.top_p, 1.0), "rollout.top_k": (rollout.top_k, 0)}
    for key, (value, whole) in truncated.items():
        if value == whole:
            continue
        if not kind.can_truncate:
            raise ConfigError(key, value, f"the {name} sampler draws from all tokens", f"Use {whole}, or rollout=vllm")
        if objective.kind.reads_likelihood and not rollout.allow_truncated_sampling:
            rule = "the bound is an expectation over the policy's own samples, and these would not be"
            fix = f"Use {whole}, or accept the bias with rollout.allow_truncated_sampling=true"
            raise ConfigError(key, value, rule, fix)
    if rollout.max_staleness and not kind.can_run_ahead:
        rule = f"the {name} sampler takes turns with the trainer and cannot run ahead"
        raise ConfigError("rollout.max_staleness", rollout.max_staleness, rule, "Use 0, or rollout=vllm")
    if kind.has_servers and rollout.server_urls() is None and trainer.num_nodes > 1:
        rule = f"starts servers on the trainer's own node, and trainer.num_nodes is {trainer.num_nodes}"
        fix = "Start `nemo-jepo serve` on the rollout nodes and give their URLs"
        raise ConfigError("rollout.servers", "auto", rule, fix)


def _check_shared_gpus(rollout: RolloutConfig, trainer: TrainerConfig, model: ModelConfig) -> None:
    """Servers on the trainers' GPUs are the run's own, on all of them, and nothing else stays there."""
    if not rollout.kind.shares_gpus:
        return
    if rollout.server_urls() is not None:
        rule = f"rollout={rollout.name} puts the run's own servers to sleep"
        raise ConfigError("rollout.servers", rollout.servers, rule, "Use auto, or rollout=vllm")
    if trainer.num_nodes > 1:
        rule = f"rollout={rollout.name} starts its servers on one node"
        raise ConfigError("trainer.num_nodes", trainer.num_nodes, rule, "Use 1, or rollout=vllm")
    if rollout.vllm.weight_transfer == "nccl":
        rule = "NCCL takes no two ranks on one GPU, and servers share the trainers'"
        raise ConfigError("rollout.vllm.weight_transfer", "nccl", rule, "Use auto")
    taken = rollout.vllm.num_servers * rollout.vllm.tensor_parallel_size
    if taken != trainer.devices:
        key = "rollout.vllm.num_servers * rollout.vllm.tensor_parallel_size"
        raise ConfigError(key, taken, f"must be trainer.devices={trainer.devices}, the GPUs they share", "Change one")
    if model.reference_policy != "cpu":
        rule = f"it would stay on GPUs that rollout={rollout.name} shares with servers"
        raise ConfigError("model.reference_policy", model.reference_policy, rule, "Use cpu")


def _check_model(model: ModelConfig, pretrained: PretrainedConfig) -> None:
    sources = {
        "model.hf_config": model.hf_config,
        "model.hf_config_path": model.hf_config_path,
        "pretrained_checkpoint.restore_from_path": pretrained.restore_from_path,
    }
    given = [key for key, value in sources.items() if value]
    if len(given) != 1:
        rule = "exactly one of them must say what the model is"
        raise ConfigError(", ".join(sources), given, rule, "Give one" if not given else "Set the others to null")
    shape = model_shape(model, pretrained.restore_from_path)
    if shape is None:
        return
    for name in ("num_attention_heads", "intermediate_size", "num_hidden_layers"):
        if shape.get(name) is None:
            raise ConfigError(given[0], list(shape), f"the model's shape has no {name}", "Add it")
    check_layout(model, shape)


def _check_loggers(exp_manager: ExpManagerConfig) -> None:
    for library in ("wandb", "mlflow"):
        key = f"create_{library}_logger"
        if getattr(exp_manager, key) and find_spec(library) is None:
            raise ConfigError(
                f"exp_manager.{key}", True, f"{library} is not installed", "Install it, or leave this out"
            )
