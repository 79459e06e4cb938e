"""What one pass over a packed row needs beside its tokens: rotation angles, and who attends to whom.

Shape letters: T tokens of a row on this rank, C context-parallel ranks, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from nemo_jepo.actor.context import local_positions
from nemo_jepo.types import PackedRow


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on a device, without waiting for what the device does."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Slots:
    """An arrangement of T tokens in which every token stands once or, in a shared prompt, several times."""

    tokens: Tensor
    """[slots] int64: which token stands there; any one where none does."""
    first: Tensor
    """[T] int64: a slot of each token."""
    shared: Tensor
    """[U] int64: tokens with further slots, those with most of them first."""
    further: Sequence[Tensor]
    """The second slot of as many of them as have one, from the first on; the third; and so on."""

    @classmethod
    def of(cls, tokens: Tensor, num_tokens: int) -> "Slots":
        """From [slots] int64 on the host, -1 where no token stands; every token stands somewhere."""
        slots = (tokens >= 0).nonzero()[:, 0]
        slots = slots[tokens[slots].argsort(stable=True)]
        counts = tokens[slots].bincount(minlength=num_tokens)
        begin = counts.cumsum(0) - counts
        shared = (counts > 1).nonzero()[:, 0]
        shared = shared[counts[shared].argsort(descending=True, stable=True)]
        further = []
        for number in range(1, int(counts.max())):
            several = shared[: int((counts > number).sum())]
            further.append(slots[begin[several] + number])
        return cls(tokens.clamp_min(0), slots[begin], shared, further)

    def to(self, device: torch.device) -> "Slots":
        """On a device."""
        tokens, first, shared = (to_device(tensor, device) for tensor in (self.tokens, self.first, self.shared))
        return Slots(tokens, first, shared, [to_device(slots, device) for slots in self.further])


@dataclass(frozen=True, slots=True)
class Bucket:
    """Segments of similar length, which one call of attention serves; right-padded."""

    queries: Tensor
    """[segments, longest of this rank's queries] int64: where each query lies on this rank; -1 past the end."""
    keys: Tensor
    """[segments, longest] int64: where each key lies among the keys gathered from all ranks; -1 past the end."""
    mask: Tensor | None
    """[segments, 1, queries, keys] bool, True where attention is allowed; None: causal, queries and keys the same."""


def buckets(row: PackedRow, rank: int = 0, size: int = 1) -> list[Bucket]:
    """A row's segments, grouped so that padding inside a group less than doubles its queries and its keys.

    Segments whose lengths round up to the same powers of two share a group, so one call serves all of them: a row of
    50 short sequences costs one call a layer, not 50.

    Args:
        row: with context parallelism, every segment a multiple of 2 C and no shared prompt.
        rank, size: this rank's place in the context-parallel group.
    """
    ends = row.cu_seqlens.to(torch.int64)
    spans = torch.stack([ends[:-1], ends[1:]], 1)
    prompts = torch.where(row.prompt_segment[:, None] >= 0, spans[row.prompt_segment], 0)
    own, shared = ((part[:, 1] - part[:, 0]).tolist() for part in (spans, prompts))
    groups: dict[tuple[bool, int, int], list[int]] = {}
    for number, (length, before) in enumerate(zip(own, shared, strict=True)):
        kind = before > 0, (length - 1).bit_length(), (before + length - 1).bit_length()
        groups.setdefault(kind, []).append(number)
    if size > 1:
        return _over_context(row.cu_seqlens, [spans[groups[kind]] for kind in sorted(groups)], rank, size)
    found = []
    for kind in sorted(groups):
        numbers, after_prompt = groups[kind], kind[0]
        found.append(_after_prompt(spans[numbers], prompts[numbers]) if after_prompt else _causal(spans[numbers]))
    return found


def _positions(spans: Tensor) -> Tensor:
    """[segments, longest] positions of [segments, 2] starts and ends; -1 past the end."""
    starts, lengths = spans[:, :1], spans[:, 1:] - spans[:, :1]
    offsets = torch.arange(int(lengths.max()))
    return torch.where(offsets < lengths, starts + offsets, -1)


def _causal(spans: Tensor) -> Bucket:
    positions = _positions(spans)
    return Bucket(positions, positions, None)


def _after_prompt(spans: Tensor, prompts: Tensor) -> Bucket:
    """Keys are the prompt's and then the segment's own, so query i sees the first (prompt length + i + 1) of them."""
    starts, own = spans[:, :1], spans[:, 1:] - spans[:, :1]
    shared = prompts[:, 1:] - prompts[:, :1]
    offsets = torch.arange(int((shared + own).max()))
    keys = torch.where(offsets < shared, prompts[:, :1] + offsets, starts + offsets - shared)
    keys = torch.where(offsets < shared + own, keys, -1)
    queries = _positions(spans)
    last = shared + torch.arange(queries.shape[1])  # a query past the end sees something: an empty softmax is NaN
    return Bucket(queries, keys, (offsets <= last[:, :, None])[:, None])


def _over_context(cu_seqlens: Tensor, chosen: Sequence[Tensor], rank: int, size: int) -> list[Bucket]:
    """Buckets of this rank's queries over keys that come from every rank."""
    own = local_positions(cu_seqlens, rank, size)
    gathered = torch.cat([local_positions(cu_seqlens, other, size) for other in range(size)])
    slot_of = torch.empty_like(gathered)
    slot_of[gathered] = torch.arange(len(gathered))
    found = []
    for spans in chosen:
        queries, keys = _positions(spans // size), _positions(spans)
        query_position = torch.where(queries >= 0, own[queries.clamp_min(0)], -1)[:, :, None]
        allowed = (query_position >= keys[:, None, :]) & (keys >= 0)[:, None, :]
        allowed |= query_position < 0
        found.append(Bucket(queries, torch.where(keys >= 0, slot_of[keys.clamp_min(0)], -1), allowed[:, None]))
    return found


@dataclass(frozen=True, slots=True)
class BucketPlan:
    """The buckets of a row, ready for attention: one gather of queries and one of keys serve all of them."""

    shapes: Sequence[tuple[int, int, int]]
    """Segments, queries and keys of each bucket."""
    masks: Sequence[Tensor | None]
    """Of each bucket: added to the scores, 0 or -inf; None: causal."""
    queries: Slots
    keys: Slots


@dataclass
class RowParams(PackedSeqParams):
    """PackedSeqParams that also rotate and, where no kernel reads bounds, say who attends to whom; made when asked."""

    row: PackedRow | None = None
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    context_group: dist.ProcessGroup | None = None
    """Ranks that share the row."""
    angles: Tensor | None = None
    """[T, D / 2] fp32: of each token's position."""
    shares_prompts: bool = False

    @property
    def context_size(self) -> int:
        """C."""
        return 1 if self.context_group is None else self.context_group.size()

    @cached_property
    def cosine(self) -> Tensor:
        """[T, 1, D / 2], in the model's precision."""
        assert self.angles is not None
        return self.angles.cos()[:, None].to(self.dtype)

    @cached_property
    def sine(self) -> Tensor:
        """[T, 1, D / 2], in the model's precision."""
        assert self.angles is not None
        return self.angles.sin()[:, None].to(self.dtype)

    @cached_property
    def both_angles(self) -> Tensor:
        """[T, 1, 1, D] fp32: of both halves of a head, as Transformer Engine reads them."""
        assert self.angles is not None
        return torch.cat([self.angles, self.angles], -1)[:, None, None]

    @cached_property
    def keys(self) -> Slots:
        """Segment after segment, the keys that its queries see: the prompt's, then its own. As cu_seqlens_kv counts."""
        assert self.row is not None
        bounds = self.row.cu_seqlens.tolist()
        spans = []
        for number, prompt in enumerate(self.row.prompt_segment.tolist()):
            spans += [torch.arange(bounds[k], bounds[k + 1]) for k in (prompt, number) if k >= 0]
        return Slots.of(torch.cat(spans), bounds[-1]).to(self.device)

    @cached_property
    def buckets(self) -> BucketPlan:
        """The row's segments by length, for one call of attention each."""
        assert self.row is not None
        rank = 0 if self.context_group is None else self.context_group.rank()
        found = buckets(self.row, rank, self.context_size)
        queries = torch.cat([bucket.queries.flatten() for bucket in found])
        keys = torch.cat([bucket.keys.flatten() for bucket in found])
        tokens = len(self.row.token_ids)
        return BucketPlan(
            shapes=[(*bucket.queries.shape, bucket.keys.shape[1]) for bucket in found],
            masks=[None if bucket.mask is None else self._added(bucket.mask) for bucket in found],
            queries=Slots.of(queries, tokens // self.context_size).to(self.device),
            keys=Slots.of(keys, tokens).to(self.device),
        )

    def _added(self, allowed: Tensor) -> Tensor:
        added = torch.zeros(allowed.shape, dtype=self.dtype).masked_fill_(~allowed, -torch.inf)
        return to_device(added, self.device)


def row_params(
    row: PackedRow,
    positions: Tensor,
    inverse_frequencies: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    context_group: dist.ProcessGroup | None = None,
) -> RowParams:
    """What the layers need to keep a row's segments apart.

    Args:
        positions: [T] row positions of this rank's tokens.
        inverse_frequencies: [D / 2] fp32.
        dtype: of activations.
    """
    own = row.cu_seqlens[1:] - row.cu_seqlens[:-1]
    shares = bool((row.prompt_segment >= 0).any())
    seen = own + torch.where(row.prompt_segment >= 0, own[row.prompt_segment], 0)
    seen_bounds = torch.cat([row.cu_seqlens[:1], seen.cumsum(0, dtype=torch.int32)])
    places = to_device(row.position_ids[positions].float(), device)
    return RowParams(
        qkv_format="thd",
        cu_seqlens_q=to_device(row.cu_seqlens, device),
        cu_seqlens_kv=to_device(seen_bounds, device),
        max_seqlen_q=int(own.max()),
        max_seqlen_kv=int(seen.max()),
        row=row,
        device=device,
        dtype=dtype,
        context_group=context_group,
        angles=torch.outer(places, inverse_frequencies.to(device)),
        shares_prompts=shares,
    )
