"""How one Megatron parameter is made of Hugging Face tensors, and which slice of it a tensor-parallel rank owns.

Megatron lays query, key and value side by side per key/value group, [groups * (q_per_group + 2) * head, H], and the
gated MLP as [gate; up], so that a slice along the partitioned dimension is a valid shard (each half of fc1 apart).

Shape letters: H hidden size, D head size, K key/value heads, V vocabulary; r of n: tensor-parallel rank and size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class TensorSource(Protocol):
    """Reads slices of Hugging Face tensors by name."""

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """The whole tensor, or tensor[start:stop] along dim 0 or 1."""


class Entry(Protocol):
    """One Megatron parameter: its Hugging Face tensors, and both directions."""

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the Hugging Face tensors it is made of."""

    def read_shard(self, source: TensorSource, rank: int, size: int) -> Tensor:
        """Rank's slice of the Megatron parameter, read slice by slice."""

    def shard_shape(self, size: int) -> tuple[int, ...]:
        """Shape of a rank's slice."""

    def join(self, shards: Tensor) -> Iterator[tuple[str, Tensor]]:
        """All ranks' slices, [n, ...], as whole Hugging Face tensors, in the order of hf_shapes."""


@dataclass(frozen=True, slots=True)
class Whole:
    """A parameter that every tensor-parallel rank holds: norms and routers."""

    name: str
    shape: tuple[int, ...]

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.name: self.shape}

    def read_shard(self, source: TensorSource, rank: int, size: int) -> Tensor:
        return source.read(self.name)

    def shard_shape(self, size: int) -> tuple[int, ...]:
        return self.shape

    def join(self, shards: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield self.name, shards[0]


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
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]  # which may still lie in the file

    def shard_shape(self, size: int) -> tuple[int, ...]:
        part = [-(-length // size) if dim == self.dim else length for dim, length in enumerate(self.shape)]
        return (len(self.names) * part[0], *part[1:])

    def join(self, shards: Tensor) -> Iterator[tuple[str, Tensor]]:
        for name, pieces in zip(self.names, shards.chunk(len(self.names), dim=1), strict=True):
            whole = pieces.flatten(0, 1) if self.dim == 0 else torch.cat(tuple(pieces), self.dim)
            yield name, whole.narrow(self.dim, 0, self.shape[self.dim])


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

    def shard_shape(self, size: int) -> tuple[int, ...]:
        return (self.num_kv_heads // size * sum(count for _, count in self._rows()), *self.trailing)

    def join(self, shards: Tensor) -> Iterator[tuple[str, Tensor]]:
        rows = [count for _, count in self._rows()]
        pieces = shards.reshape(self.num_kv_heads, sum(rows), *self.trailing).split(rows, dim=1)
        for (name, _), piece in zip(self._rows(), pieces, strict=True):
            yield name, piece.flatten(0, 1)
