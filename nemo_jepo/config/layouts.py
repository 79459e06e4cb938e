"""Rules between a model's shape, layout and precision, checked before a model is built. No torch here."""

from collections.abc import Mapping
from typing import Any

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.model import ModelConfig

FP8_TOKENS = 16
"""FP8 matrix products need both sides of a token matrix divisible by it (Megatron's fp8_utils.get_fp8_align_size)."""
BLOCKWISE_TOKENS = 128
"""The side of a block. Sequence-parallel shards of other sizes are gathered in BF16: Transformer Engine 2.11,
Float8BlockQuantizer.is_quantizable."""


def check_layout(model: ModelConfig, shape: Mapping[str, Any]) -> None:
    """Every rule of Megatron's layouts for one model.

    Args:
        shape: a Hugging Face config as a mapping.
    Raises:
        ConfigError: the first broken rule.
    """
    num_experts = shape.get("num_local_experts") or shape.get("num_experts") or 0
    _check_tensor_parallel(model, shape, num_experts)
    _check_pipeline(model, shape["num_hidden_layers"])
    _check_passes(model)
    _check_rows(model)
    _check_experts(model, num_experts)


def _check_tensor_parallel(model: ModelConfig, shape: Mapping[str, Any], num_experts: int) -> None:
    size = model.tensor_model_parallel_size
    cut = {
        "num_attention_heads": shape["num_attention_heads"],
        "num_key_value_heads": shape.get("num_key_value_heads") or shape["num_attention_heads"],
        "intermediate_size": 0 if num_experts else shape["intermediate_size"],  # an expert is never cut
    }
    for name, count in cut.items():
        if count % size:
            raise ConfigError("model.tensor_model_parallel_size", size, f"must divide {name}={count}", "Use a divisor")


def stage_layers(model: ModelConfig, num_layers: int) -> list[int]:
    """Layers of each pipeline stage.

    Raises:
        ConfigError: they cannot be dealt out as the settings say.
    """
    stages = model.pipeline_model_parallel_size
    first, last = model.num_layers_in_first_pipeline_stage, model.num_layers_in_last_pipeline_stage
    fixed = [count for count in (first, last) if count is not None]
    rest, over = num_layers - sum(fixed), stages - len(fixed)
    key = "model.pipeline_model_parallel_size"
    if fixed and stages == 1:
        raise ConfigError(key, 1, "has no first and last stage to tell apart", "Leave num_layers_in_..._stage null")
    if rest < 0 or (rest % over if over else rest):
        share = f"{rest} of num_hidden_layers={num_layers} are left for {over} equal stages"
        fix = "Set model.num_layers_in_first_pipeline_stage and ..._last_..., or another number of stages"
        raise ConfigError(key, stages, share, fix)
    between = [rest // over] * over if over else []
    return [*([first] if first is not None else []), *between, *([last] if last is not None else [])]


def _check_pipeline(model: ModelConfig, num_layers: int) -> None:
    counts, chunks = stage_layers(model, num_layers), model.virtual_pipeline_model_parallel_size
    if chunks is None:
        return
    key = "model.virtual_pipeline_model_parallel_size"
    if model.pipeline_model_parallel_size == 1:
        raise ConfigError(key, chunks, "interleaves pipeline stages, and there is one", "Set it to null")
    if chunks == 1:
        raise ConfigError(key, 1, "one chunk a stage is the plain schedule", "Set it to null")
    for count in counts:
        if count % chunks:
            raise ConfigError(key, chunks, f"must divide the {count} layers of a stage", "Use a divisor")


def _check_passes(model: ModelConfig) -> None:
    """One forward pass keeps its graph until the weights are known."""
    if model.update_passes != "one":
        return
    fix = "Use model.update_passes=auto"
    if model.pipeline_model_parallel_size > 1:
        raise ConfigError("model.update_passes", "one", "a pipeline's stages score before they train", fix)
    if model.fp8 and model.fp8_guard_interval and model.fp8_guard_action == "bf16":
        rule = "with model.fp8_guard_action=bf16 scoring may leave FP8 while training stays in it"
        raise ConfigError("model.update_passes", "one", rule, fix)


def _check_rows(model: ModelConfig) -> None:
    """A packed row is cut over context- and, with sequence parallelism, tensor-parallel ranks."""
    key, tokens = "model.tokens_per_micro_batch", model.tokens_per_micro_batch
    if tokens % model.segment_multiple:
        rule = f"context parallelism deals a row over {model.context_parallel_size} ranks, two parts each"
        raise ConfigError(key, tokens, rule, f"Use a multiple of {model.segment_multiple}")
    if tokens % model.row_shards:
        rule = f"sequence parallelism shards a row over {model.row_shards} ranks"
        raise ConfigError(key, tokens, rule, f"Use a multiple of {model.row_shards}")


def _check_experts(model: ModelConfig, num_experts: int) -> None:
    key, size = "model.expert_model_parallel_size", model.expert_model_parallel_size
    if size > 1 and not num_experts:
        raise ConfigError(key, size, "this model has no experts", "Set it to 1")
    if num_experts % size:
        raise ConfigError(key, size, f"must divide num_experts={num_experts}", "Use a divisor")
    if num_experts and model.tensor_model_parallel_size > 1 and not model.sequence_parallel:
        rule = "experts take each token once, so tensor-parallel ranks must hold different ones"
        raise ConfigError("model.sequence_parallel", False, rule, "Set it to true")


def fp8_tokens(model: ModelConfig) -> int:
    """Tokens: each shard of a row is a multiple of it; 1 without FP8."""
    if model.fp8 is None:
        return 1
    return BLOCKWISE_TOKENS if model.fp8_recipe == "blockwise" and model.sequence_parallel else FP8_TOKENS


def check_fp8_settings(model: ModelConfig, precision: str) -> None:
    """Every rule of FP8 that needs no machine; `nemo_jepo.actor.precision` asks for the software and the GPU.

    Args:
        precision: trainer.precision.
    Raises:
        ConfigError: the first broken rule.
    """
    if model.fp8 is None:
        return
    if precision != "bf16":
        rule = "FP8 matrix products belong to bf16 training"
        raise ConfigError("trainer.precision", precision, rule, "Use bf16, or model.fp8=null")
    shards, tokens = model.row_shards, fp8_tokens(model)
    if model.tokens_per_micro_batch % (tokens * shards):
        rule = f"FP8 needs a multiple of {tokens} tokens in each of the {shards} shards of a row"
        fix = f"Use a multiple of {tokens * shards}"
        raise ConfigError("model.tokens_per_micro_batch", model.tokens_per_micro_batch, rule, fix)
