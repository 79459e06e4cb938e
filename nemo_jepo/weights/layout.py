"""How one Megatron parameter is made of Hugging Face tensors, and which slice of it a tensor-parallel rank owns.

Megatron lays query, key and value side by side per key/value group, [groups * (q_per_group + 2) * head, H], and the
gated MLP as [gate; up], so that a slice along the partitioned dimension is a valid shard (each half of fc1 apart).

Shape letters: H hidden size, D head size, K key/value heads, V vocabulary; r of n: tensor-parallel rank and size.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class TensorSource(Protocol):
    """Reads slices of Hugging Face tensors by name."""

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """The whole tensor, or tensor[start:stop] along dim 0 or 1."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of a Hugging Face config that decide layouts."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    tied: bool
    qkv_bias: bool
    qk_norm: bool

    @classmethod
    def of(cls, hf_config: Any) -> "Shape":
        """From a transformers config of a supported family."""
        return cls(
            num_layers=hf_config.num_hidden_layers,
            hidden_size=hf_config.hidden_size,
            intermediate_size=hf_config.intermediate_size,
            num_heads=hf_config.num_attention_heads,
            num_kv_heads=hf_config.num_key_value_heads,
            head_size=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads,
            vocab_size=hf_config.vocab_size,
            tied=hf_config.tie_word_embeddings,
            qkv_bias=hf_config.model_type == "qwen2",
            qk_norm=hf_config.model_type == "qwen3",
        )


class Entry(Protocol):
    """One Megatron parameter: its Hugging Face tensors, and both directions."""

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the Hugging Face tensors it is made of."""

    def read_shard(self, source: TensorSource, rank: int, size: int) -> Tensor:
        """Rank's slice of the Megatron parameter, read slice by slice."""

    def join_shards(self, shards: list[Tensor]) -> dict[str, Tensor]:
        """All ranks' slices as whole Hugging Face tensors."""


@dataclass(frozen=True, slots=True)
class Whole:
    """A parameter that every tensor-parallel rank holds: norms."""

    name: str
    shape: tuple[int, ...]

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.name: self.shape}

    def read_shard(self, source: TensorSource, rank: int, size: int) -> Tensor:
        return source.read(self.name)

    def join_shards(self, shards: list[Tensor]) -> dict[str, Tensor]:
        return {self.name: shards[0]}


@dataclass(frozen=True, slots=True)
class Sliced:
    """Tensors stacked along dim 0, each cut into n equal parts along `dim` (one for most, [gate; up] for fc1).

    A vocabulary is cut after padding its rows to a multiple of n; the padding is zero and never leaves Megatron.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dim: int

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self.shape for name in self.names}

    def read_shard(self, source: TensorSource, rank: int, size: int) -> Tensor:
        whole = self.shape[self.dim]
        part = -(-whole // size)
        start, stop = min(rank * part, whole), min((rank + 1) * part, whole)
        pieces = [source.read(name, self.dim, start, stop) for name in self.names]
        if stop - start < part:
            padding = (0, 0) * (len(self.shape) - 1 - self.dim) + (0, part - (stop - start))
            pieces = [torch.nn.functional.pad(piece, padding) for piece in pieces]
        return torch.cat(pieces)

    def join_shards(self, shards: list[Tensor]) -> dict[str, Tensor]:
        parts = [shard.chunk(len(self.names)) for shard in shards]
        joined = {}
        for position, name in enumerate(self.names):
            tensor = torch.cat([part[position] for part in parts], self.dim)
            joined[name] = tensor.narrow(self.dim, 0, self.shape[self.dim])
        return joined


@dataclass(frozen=True, slots=True)
class GroupedQKV:
    """Query, key and value (weights or biases) interleaved by key/value group."""

    prefix: str
    suffix: str
    num_heads: int
    num_kv_heads: int
    head_size: int
    trailing: tuple[int, ...]
    """(H,) for weights, () for biases."""

    def _rows(self) -> tuple[tuple[str, int], ...]:
        """Each tensor's name and rows per key/value group."""
        query = self.num_heads // self.num_kv_heads * self.head_size
        sizes = (("q_proj", query), ("k_proj", self.head_size), ("v_proj", self.head_size))
        return tuple((f"{self.prefix}{name}.{self.suffix}", rows) for name, rows in sizes)

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: (self.num_kv_heads * rows, *self.trailing) for name, rows in self._rows()}

    def read_shard(self, source: TensorSource, rank: int, size: int) -> Tensor:
        groups = self.num_kv_heads // size
        pieces = [
            source.read(name, 0, rank * groups * rows, (rank + 1) * groups * rows).view(groups, rows, *self.trailing)
            for name, rows in self._rows()
        ]
        return torch.cat(pieces, dim=1).flatten(0, 1)

    def join_shards(self, shards: list[Tensor]) -> dict[str, Tensor]:
        whole = torch.cat(shards)
        rows = [count for _, count in self._rows()]
        pieces = whole.view(self.num_kv_heads, sum(rows), *self.trailing).split(rows, dim=1)
        return {name: piece.flatten(0, 1) for (name, _), piece in zip(self._rows(), pieces, strict=True)}


def layer_entries(shape: Shape, layer: int) -> dict[str, Entry]:
    """Megatron names inside one layer (local-spec names) -> entries."""
    hf = f"model.layers.{layer}."
    attention = f"{hf}self_attn."
    hidden, inner = shape.hidden_size, shape.intermediate_size
    heads = (shape.num_heads, shape.num_kv_heads, shape.head_size)
    entries: dict[str, Entry] = {
        "input_layernorm.weight": Whole(f"{hf}input_layernorm.weight", (hidden,)),
        "self_attention.linear_qkv.weight": GroupedQKV(attention, "weight", *heads, (hidden,)),
        "self_attention.linear_proj.weight": Sliced(
            (f"{attention}o_proj.weight",), (hidden, shape.num_heads * shape.head_size), 1
        ),
        "pre_mlp_layernorm.weight": Whole(f"{hf}post_attention_layernorm.weight", (hidden,)),
        "mlp.linear_fc1.weight": Sliced((f"{hf}mlp.gate_proj.weight", f"{hf}mlp.up_proj.weight"), (inner, hidden), 0),
        "mlp.linear_fc2.weight": Sliced((f"{hf}mlp.down_proj.weight",), (hidden, inner), 1),
    }
    if shape.qkv_bias:
        entries["self_attention.linear_qkv.bias"] = GroupedQKV(attention, "bias", *heads, ())
    if shape.qk_norm:
        for name in ("q", "k"):
            entries[f"self_attention.{name}_layernorm.weight"] = Whole(
                f"{attention}{name}_norm.weight", (shape.head_size,)
            )
    return entries


# Transformer Engine folds a norm into the linear layer that follows it.
TE_NAMES: Mapping[str, str] = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def model_entries(shape: Shape) -> Iterator[tuple[str, int | None, Entry]]:
    """Every parameter of the whole model in order: (global Megatron name, layer or None, entry).

    Layer None is the embedding ("embedding..."), the final norm ("decoder.final_layernorm...") or the output layer.
    """
    table = (shape.vocab_size, shape.hidden_size)
    yield "embedding.word_embeddings.weight", None, Sliced(("model.embed_tokens.weight",), table, 0)
    for layer in range(shape.num_layers):
        for name, entry in layer_entries(shape, layer).items():
            yield f"decoder.layers.{layer}.{name}", layer, entry
    yield "decoder.final_layernorm.weight", None, Whole("model.norm.weight", (shape.hidden_size,))
    if not shape.tied:
        yield "output_layer.weight", None, Sliced(("lm_head.weight",), table, 0)
