"""Context parallelism: which tokens of a packed row a rank holds, and who attends to whom.

A segment is cut into 2 C equal parts and rank r of C holds parts r and 2 C - 1 - r, so that causal attention costs
every rank the same. Transformer Engine deals packed rows the same way (thd_get_partitioned_indices), and Megatron's
rotary embedding expects it. `packing` pads segments to a multiple of 2 C.

Shape letters: T tokens of a row, C context-parallel ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on a device, without waiting for what the device does."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def local_positions(cu_seqlens: Tensor, rank: int, size: int) -> Tensor:
    """Row positions of the tokens on one context-parallel rank, [T / C], in the order in which it holds them.

    Args:
        cu_seqlens: [segments + 1] int, from 0 to T; every segment a multiple of 2 C, where C is not 1.
    """
    if size == 1:
        return torch.arange(int(cu_seqlens[-1]))
    bounds = cu_seqlens.tolist()
    parts = []
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        part = (end - start) // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            parts.append(torch.arange(start + number * part, start + (number + 1) * part))
    return torch.cat(parts)


@dataclass(frozen=True, slots=True)
class SegmentBucket:
    """Segments of similar length, which one call of attention serves."""

    queries: Tensor
    """[segments, longest of this rank's queries] int64: where each query lies on this rank; -1 past the end."""
    keys: Tensor
    """[segments, longest] int64: where each key lies among the keys gathered from all ranks; -1 past the end."""
    mask: Tensor | None
    """[segments, 1, queries, keys] bool, True where attention is allowed; None: causal, queries and keys the same."""
    slots: Tensor
    """[tokens] int64: which of the flattened queries are tokens; on the device a mask would ask for their number."""
    tokens: Tensor
    """[tokens] int64: the queries at those slots."""

    def to(self, device: torch.device) -> "SegmentBucket":
        """On a device."""
        queries, keys, slots, tokens = (
            to_device(tensor, device) for tensor in (self.queries, self.keys, self.slots, self.tokens)
        )
        return SegmentBucket(queries, keys, None if self.mask is None else to_device(self.mask, device), slots, tokens)


def _bucket(queries: Tensor, keys: Tensor, mask: Tensor | None) -> SegmentBucket:
    flat = queries.flatten()
    slots = (flat >= 0).nonzero()[:, 0]
    return SegmentBucket(queries, keys, mask, slots, flat[slots])


def segment_buckets(cu_seqlens: Tensor, rank: int = 0, size: int = 1) -> list[SegmentBucket]:
    """A row's segments, grouped so that padding inside a group less than doubles its tokens.

    Segments whose lengths round up to the same power of two share a group, so one call serves all of them: a row of
    50 short sequences costs one call a layer, not 50.

    Args:
        cu_seqlens: as local_positions takes it.
        rank, size: this rank's place in the context-parallel group.
    """
    groups: dict[int, list[tuple[int, int]]] = {}
    bounds = cu_seqlens.tolist()
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        groups.setdefault((end - start - 1).bit_length(), []).append((start, end))
    spans = [torch.tensor(groups[length]) for length in sorted(groups)]
    if size == 1:
        return [_bucket(positions, positions, None) for positions in map(_positions, spans)]
    own = local_positions(cu_seqlens, rank, size)
    gathered = torch.cat([local_positions(cu_seqlens, other, size) for other in range(size)])
    slot_of = torch.empty_like(gathered)
    slot_of[gathered] = torch.arange(len(gathered))
    return [_shared_bucket(_positions(span), _positions(span // size), own, slot_of) for span in spans]


def _positions(spans: Tensor) -> Tensor:
    """[segments, longest] positions of [segments, 2] starts and ends; -1 past the end."""
    starts, lengths = spans[:, :1], spans[:, 1:] - spans[:, :1]
    offsets = torch.arange(int(lengths.max()))
    return torch.where(offsets < lengths, starts + offsets, -1)


def _shared_bucket(keys: Tensor, queries: Tensor, own: Tensor, slot_of: Tensor) -> SegmentBucket:
    """A bucket whose keys come from every rank."""
    query_position = torch.where(queries >= 0, own[queries.clamp_min(0)], -1)[:, :, None]
    allowed = (query_position >= keys[:, None, :]) & (keys >= 0)[:, None, :]
    allowed |= query_position < 0  # a query past the end sees something: an empty softmax is NaN
    return _bucket(queries, torch.where(keys >= 0, slot_of[keys.clamp_min(0)], -1), allowed[:, None])
