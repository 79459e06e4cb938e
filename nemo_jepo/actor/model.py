"""A Hugging Face config becomes a megatron-core GPTModel whose last stage returns hidden states.

The families are those of weights/families.py, tied or untied, with plain or llama3 RoPE. With Transformer Engine on a
GPU its layers serve in bf16; otherwise megatron-core's local layers with packed SDPA attention.
"""

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from nemo_jepo.actor.attention import PackedAttention
from nemo_jepo.actor.local_layers import PackedRMSNorm, SwiGLU
from nemo_jepo.actor.precision import assert_fp8_is_used, fp8_options
from nemo_jepo.actor.weights.families import Shape, family_of
from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.reading import library
from nemo_jepo.config.schema import ModelConfig
from nemo_jepo.config.shapes import check_shape, is_positive, read_hf_config

log = logging.getLogger(__name__)

_LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def load_hf_config(source: str | dict[str, Any], key: str = "model") -> PretrainedConfig:
    """The Hugging Face config of a folder, a config.json or an inline mapping with a model_type.

    The file is read here and not by transformers, which would follow what it says to other files and to code.

    Args:
        key: of the setting that names a folder or a file, for the error.
    Raises:
        ConfigError: another family, a variant of one that the actor would compute differently, or no config at all.
    """
    file = None
    if isinstance(source, str):
        file = Path(source) / "config.json" if Path(source).is_dir() else Path(source)
        shape = read_hf_config(key, file)
    else:
        key, shape = "model.hf_config", dict(source)
        check_shape(key, shape)
    family = shape.pop("model_type", None)
    family_of(family, "model_type" if file else "model.hf_config.model_type")
    fix = "Copy the file again, or correct it" if file else "Correct it"
    with library(key, str(file) if file else source, "transformers refuses it", fix):
        config = AutoConfig.for_model(family, **shape)
        whole = config.to_dict()
    check_shape(key, whole, file)
    _check_family(config)
    return config


def _check_family(config: PretrainedConfig) -> None:
    rope = getattr(config, "rope_parameters", None)
    rope = rope if isinstance(rope, dict) else {}
    kind = rope.get("rope_type")
    supported = kind == "default" or (
        kind == "llama3" and all(rope.get(key) == value for key, value in _LLAMA3_SCALING.items())
    )
    if not supported:
        raise ConfigError("rope_parameters", rope, "only plain and llama3 scaling exist in the actor", "Use these")
    for key in ("rope_theta", "factor") if kind == "llama3" else ("rope_theta",):
        if not is_positive(rope.get(key)):
            raise ConfigError(f"rope_parameters.{key}", rope.get(key), "must be a positive number", "Correct it")
    for key, plain in (("hidden_act", "silu"), ("mlp_bias", False), ("use_sliding_window", False)):
        if getattr(config, key, plain) != plain:
            raise ConfigError(key, getattr(config, key), f"the actor computes {plain!r} only", "Use another model")
    if getattr(config, "attention_bias", False):
        raise ConfigError("attention_bias", True, "the actor has no such biases", "Use another model")
    found = getattr(config, "mlp_only_layers", None) or [], getattr(config, "decoder_sparse_step", 1)
    if found != ([], 1):
        raise ConfigError(
            "mlp_only_layers, decoder_sparse_step", found, "the actor has experts in every layer", "Use another model"
        )


def use_transformer_engine(dtype: torch.dtype) -> bool:
    """True where Transformer Engine's layers will serve: half precision, CUDA and the package.

    In fp32 Transformer Engine 2.11 attends to packed rows by whole score matrices alone, and under context parallelism
    not at all (get_attention_backend).
    """
    return dtype in (torch.bfloat16, torch.float16) and has_transformer_engine()


@cache
def has_transformer_engine() -> bool:
    """CUDA and the package both present."""
    if not torch.cuda.is_available():
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        log.warning("Transformer Engine is not installed: local layers with torch's attention serve, a little slower")
        return False
    return True


def transformer_config(hf_config: PretrainedConfig, model: ModelConfig, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's TransformerConfig of a Hugging Face shape in a parallel layout; no dropout anywhere."""
    on_gpu, fused = torch.cuda.is_available(), use_transformer_engine(dtype)
    cudnn = fused and torch.cuda.get_device_capability() >= (9, 0)
    interleaved = model.virtual_pipeline_model_parallel_size is not None
    shape = Shape.of(hf_config)
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.inner_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_size,
        normalization="RMSNorm",
        layernorm_epsilon=hf_config.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.family.qkv_bias,
        qk_layernorm=shape.family.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        # Where cuDNN's kernels take packed rows: `auto` would fall back to slow attention without a word.
        attention_backend=AttnBackend.fused if cudnn else AttnBackend.auto,
        # Without Transformer Engine torch.compile makes the kernel, for every number of tokens that an expert gets.
        bias_activation_fusion=on_gpu and (fused or not shape.num_experts),
        use_te_activation_func=not on_gpu,  # Megatron's switch for an activation that the layer spec names
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=not on_gpu,
        perform_initialization=True,  # also marks the tensor-parallel parameters, which the gradient norm needs
        params_dtype=dtype,
        pipeline_dtype=dtype,
        # Gloo mixes up what an interleaved schedule sends at once; on GPUs it sends while it computes, one by one.
        batch_p2p_comm=on_gpu and not interleaved,
        overlap_p2p_comm=on_gpu and interleaved,
        bf16=dtype == torch.bfloat16,
        # Token weights carry the global denominators, so gradients are summed, not averaged (docs/decisions/0001).
        calculate_per_token_loss=True,
        **_parallel_options(model),
        **_recompute_options(model),
        **fp8_options(model),
        **(_expert_options(hf_config, shape, model, fused) if shape.num_experts else {}),
    )


def _parallel_options(model: ModelConfig) -> dict[str, Any]:
    """The layout, which has Megatron's own names."""
    return {
        "tensor_model_parallel_size": model.tensor_model_parallel_size,
        "pipeline_model_parallel_size": model.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": model.virtual_pipeline_model_parallel_size,
        "num_layers_in_first_pipeline_stage": model.num_layers_in_first_pipeline_stage,
        "num_layers_in_last_pipeline_stage": model.num_layers_in_last_pipeline_stage,
        "context_parallel_size": model.context_parallel_size,
        "sequence_parallel": model.sequence_parallel,
    }


def _recompute_options(model: ModelConfig) -> dict[str, Any]:
    """What the backward pass computes again instead of keeping it."""
    if model.activations_checkpoint_granularity == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if model.activations_checkpoint_granularity == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}


def _expert_options(hf_config: PretrainedConfig, shape: Shape, model: ModelConfig, grouped: bool) -> dict[str, Any]:
    """Experts as the families compute them: no token is dropped, no auxiliary loss joins the objective.

    Args:
        grouped: Transformer Engine's products of all experts together.
    """
    return {
        "num_moe_experts": shape.num_experts,
        "moe_ffn_hidden_size": shape.inner_size,
        "moe_router_topk": shape.experts_per_token,
        # softmax over the chosen experts is softmax over all, renormalised over the chosen
        "moe_router_pre_softmax": not getattr(hf_config, "norm_topk_prob", True),
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": grouped,
        "expert_model_parallel_size": model.expert_model_parallel_size,
        "expert_tensor_parallel_size": 1,
    }


def layer_spec(config: TransformerConfig, vp_stage: int | None = None) -> ModuleSpec | TransformerBlockSubmodules:
    """Transformer Engine's layers where they can run, else local layers with packed SDPA attention."""
    options = {"num_experts": config.num_moe_experts, "moe_grouped_gemm": config.moe_grouped_gemm}
    if use_transformer_engine(config.params_dtype):
        from nemo_jepo.actor.te_attention import RowAttention

        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm, **options)
        layer.submodules.self_attention.submodules.core_attention = RowAttention
        return layer
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm, **options)
    parts = layer.submodules
    mlp = parts.mlp.submodules.experts.submodules if config.num_moe_experts else parts.mlp.submodules
    mlp.activation_func = SwiGLU  # read with use_te_activation_func alone
    if config.num_moe_experts:  # a checkpoint has Transformer Engine's names: it joins a norm to the matrix after it,
        parts.sharded_state_dict_keys_map = {  # but not to experts
            name: saved
            for name, saved in parts.sharded_state_dict_keys_map.items()
            if not name.startswith("pre_mlp_layernorm")
        }
    parts.input_layernorm = parts.pre_mlp_layernorm = PackedRMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = PackedRMSNorm
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=vp_stage),
        layer_norm=PackedRMSNorm,
    )


class HiddenStateGPTModel(GPTModel):
    """GPTModel whose last stage hands out hidden states, so that the output head can run in chunks.

    It has no rotary embedding of its own: the core attention rotates, by the positions that a packed row says.
    """

    inverse_frequencies: Tensor
    """[D / 2] fp32: a head's rotation angles at position 1."""

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    def head_weight(self) -> Tensor:
        """This rank's rows of the output matrix, [V_padded / TP, H]: the embedding where the two are tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def padded_vocab_size(hf_config: PretrainedConfig, tensor_parallel_size: int) -> int:
    """Smallest multiple of the tensor-parallel size that holds the vocabulary; padding is never scored.

    Raises:
        ConfigError: so few tokens that the last rank would hold padding alone.
    """
    rows = -(-hf_config.vocab_size // tensor_parallel_size)
    if rows * (tensor_parallel_size - 1) >= hf_config.vocab_size:
        rule = f"leaves a rank without a token of vocab_size={hf_config.vocab_size}"
        raise ConfigError("model.tensor_model_parallel_size", tensor_parallel_size, rule, "Lower it")
    return rows * tensor_parallel_size


def build_chunks(hf_config: PretrainedConfig, model: ModelConfig, dtype: torch.dtype) -> list[torch.nn.Module]:
    """This rank's part of the model, weights unset: weights/ fills every parameter.

    Returns:
        One model chunk, or model.virtual_pipeline_model_parallel_size of them. Each is a HiddenStateGPTModel, inside
        Megatron's Float16Module for bf16; on the GPU where there is one.
    """
    config = transformer_config(hf_config, model, dtype)
    num_virtual = model.virtual_pipeline_model_parallel_size
    stages: Sequence[int | None] = [None] if num_virtual is None else range(num_virtual)
    return [_build_chunk(hf_config, model, config, stage) for stage in stages]


def _build_chunk(
    hf_config: PretrainedConfig, model: ModelConfig, config: TransformerConfig, vp_stage: int | None
) -> torch.nn.Module:
    rope = hf_config.rope_parameters
    gpt = HiddenStateGPTModel(
        config,
        layer_spec(config, vp_stage),
        vocab_size=padded_vocab_size(hf_config, model.tensor_model_parallel_size),
        max_sequence_length=model.tokens_per_micro_batch,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
        position_embedding_type="none",
        vp_stage=vp_stage,
    )
    gpt.inverse_frequencies = RotaryEmbedding(
        config.kv_channels,
        rotary_percent=1.0,
        rotary_base=rope["rope_theta"],
        rope_scaling=rope["rope_type"] == "llama3",
        rope_scaling_factor=rope.get("factor", 8.0),
        use_cpu_initialization=config.use_cpu_initialization,
    ).inv_freq
    for name, parameter in gpt.named_parameters():
        if ".experts." in name:
            # An expert lies whole on a rank (expert tensor parallelism 1), so its gradient is summed over the
            # tensor-parallel ranks as well. Megatron-core 0.16.1 marks experts so only above expert parallelism 1.
            parameter.allreduce = False
    if config.fp8:
        assert_fp8_is_used(gpt)
    if torch.cuda.is_available():
        gpt = gpt.cuda()
    return Float16Module(config, gpt) if config.bf16 else gpt


def unwrap(module: torch.nn.Module) -> HiddenStateGPTModel:
    """The GPTModel inside Megatron's DDP and Float16Module wrappers."""
    while not isinstance(module, HiddenStateGPTModel):
        module = module.get_submodule("module")
    return module
