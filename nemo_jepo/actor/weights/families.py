"""Which parameters a model of each supported family has, under Megatron's names, and what each is made of.

    decoder.layers.<layer>.mlp.linear_fc1.weight             layers counted over the whole model
    decoder.layers.<layer>.mlp.experts.<expert>.linear_fc1.weight             experts counted over the whole layer

An expert lies whole on one expert-parallel rank (expert tensor parallelism 1); everything else is cut over the
tensor-parallel ranks as layout.py says.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_jepo.actor.weights.slices import Entry, GroupedQKV, Sliced, Whole
from nemo_jepo.config.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """How a family with experts names them inside a layer, and their width in its config."""

    router: str
    experts: str
    gate: str
    up: str
    down: str
    width_key: str


@dataclass(frozen=True, slots=True)
class Family:
    """What tells one family's parameters from another's."""

    architecture: str
    """The class in transformers and vLLM."""
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: ExpertNames | None = None


FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        qk_norm=True,
        experts=ExpertNames("mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj", "moe_intermediate_size"),
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        experts=ExpertNames("block_sparse_moe.gate", "block_sparse_moe.experts", "w1", "w3", "w2", "intermediate_size"),
    ),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of a Hugging Face config that decide layouts."""

    family: Family
    num_layers: int
    hidden_size: int
    inner_size: int
    """Channels of the gated MLP, or of one expert."""
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    tied: bool
    num_experts: int
    """Of one layer; 0 for a dense model."""

    @classmethod
    def of(cls, hf_config: Any) -> "Shape":
        """From a transformers config.

        Raises:
            ConfigError: a family without an entry above.
        """
        family = FAMILIES.get(hf_config.model_type)
        if family is None:
            raise ConfigError("model_type", hf_config.model_type, f"supported are {', '.join(FAMILIES)}", "Use these")
        width_key = family.experts.width_key if family.experts else "intermediate_size"
        return cls(
            family=family,
            num_layers=hf_config.num_hidden_layers,
            hidden_size=hf_config.hidden_size,
            inner_size=getattr(hf_config, width_key),
            num_heads=hf_config.num_attention_heads,
            num_kv_heads=hf_config.num_key_value_heads,
            head_size=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads,
            vocab_size=hf_config.vocab_size,
            tied=hf_config.tie_word_embeddings,
            num_experts=hf_config.num_local_experts if family.experts else 0,
        )


@dataclass(frozen=True, slots=True)
class ModelParameter:
    """One parameter of the whole model."""

    name: str
    """Megatron's, with layers and experts counted globally."""
    entry: Entry
    expert: int | None = None
    """The expert that it belongs to; None for what every expert-parallel rank holds."""

    @property
    def place(self) -> str:
        """What a pipeline stage holds as a whole: a layer ("decoder.layers.3"), or the parameter itself."""
        return place_of(self.name)


def place_of(name: str) -> str:
    """The place of a parameter by its name."""
    return ".".join(name.split(".")[:3]) if name.startswith("decoder.layers.") else name


def model_parameters(shape: Shape) -> Iterator[ModelParameter]:
    """Every parameter in the model's order; a tied output matrix is the embedding."""
    table = (shape.vocab_size, shape.hidden_size)
    yield ModelParameter("embedding.word_embeddings.weight", Sliced(("model.embed_tokens.weight",), table, 0))
    for layer in range(shape.num_layers):
        yield from _attention(shape, layer)
        yield from _experts(shape, layer, shape.family.experts) if shape.family.experts else _mlp(shape, layer)
    yield ModelParameter("decoder.final_layernorm.weight", Whole("model.norm.weight", (shape.hidden_size,)))
    if not shape.tied:
        yield ModelParameter("output_layer.weight", Sliced(("lm_head.weight",), table, 0))


def _attention(shape: Shape, layer: int) -> Iterator[ModelParameter]:
    megatron, hf = f"decoder.layers.{layer}.", f"model.layers.{layer}."
    attention, hidden = f"{hf}self_attn.", shape.hidden_size
    heads = (shape.num_heads, shape.num_kv_heads, shape.head_size)
    yield ModelParameter(f"{megatron}input_layernorm.weight", Whole(f"{hf}input_layernorm.weight", (hidden,)))
    qkv = f"{megatron}self_attention.linear_qkv"
    yield ModelParameter(f"{qkv}.weight", GroupedQKV(attention, "weight", *heads, (hidden,)))
    if shape.family.qkv_bias:
        yield ModelParameter(f"{qkv}.bias", GroupedQKV(attention, "bias", *heads, ()))
    if shape.family.qk_norm:
        for name in ("q", "k"):
            norm = Whole(f"{attention}{name}_norm.weight", (shape.head_size,))
            yield ModelParameter(f"{megatron}self_attention.{name}_layernorm.weight", norm)
    output = Sliced((f"{attention}o_proj.weight",), (hidden, shape.num_heads * shape.head_size), 1)
    yield ModelParameter(f"{megatron}self_attention.linear_proj.weight", output)
    norm = Whole(f"{hf}post_attention_layernorm.weight", (hidden,))
    yield ModelParameter(f"{megatron}pre_mlp_layernorm.weight", norm)


def _mlp(shape: Shape, layer: int) -> Iterator[ModelParameter]:
    megatron, hf = f"decoder.layers.{layer}.mlp.", f"model.layers.{layer}.mlp."
    hidden, inner = shape.hidden_size, shape.inner_size
    gate_up = Sliced((f"{hf}gate_proj.weight", f"{hf}up_proj.weight"), (inner, hidden), 0)
    yield ModelParameter(f"{megatron}linear_fc1.weight", gate_up)
    yield ModelParameter(f"{megatron}linear_fc2.weight", Sliced((f"{hf}down_proj.weight",), (hidden, inner), 1))


def _experts(shape: Shape, layer: int, names: ExpertNames) -> Iterator[ModelParameter]:
    megatron, hf = f"decoder.layers.{layer}.mlp.", f"model.layers.{layer}."
    hidden, inner = shape.hidden_size, shape.inner_size
    router = Whole(f"{hf}{names.router}.weight", (shape.num_experts, hidden))
    yield ModelParameter(f"{megatron}router.weight", router)
    for expert in range(shape.num_experts):
        megatron_expert, hf_expert = f"{megatron}experts.{expert}.", f"{hf}{names.experts}.{expert}."
        gate_up = tuple(f"{hf_expert}{name}.weight" for name in (names.gate, names.up))
        yield ModelParameter(f"{megatron_expert}linear_fc1.weight", Sliced(gate_up, (inner, hidden), 0), expert)
        down = Sliced((f"{hf_expert}{names.down}.weight",), (hidden, inner), 1)
        yield ModelParameter(f"{megatron_expert}linear_fc2.weight", down, expert)
