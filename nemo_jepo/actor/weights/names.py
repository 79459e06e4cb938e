"""Every parameter of a model of a supported family, under Megatron's names, and what each is made of.

    decoder.layers.<layer>.mlp.linear_fc1.weight             layers counted over the whole model
    decoder.layers.<layer>.mlp.experts.<expert>.linear_fc1.weight             experts counted over the whole layer

An expert lies whole on one expert-parallel rank (expert tensor parallelism 1); everything else is cut over the
tensor-parallel ranks as slices.py says.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from nemo_jepo.actor.weights.families import Experts, Shape
from nemo_jepo.actor.weights.slices import Entry, GroupedQKV, Sliced, Whole


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

    @property
    def is_expert(self) -> bool:
        """Whether it lies whole on one expert-parallel rank."""
        return self.expert is not None


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


def _experts(shape: Shape, layer: int, names: Experts) -> Iterator[ModelParameter]:
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
