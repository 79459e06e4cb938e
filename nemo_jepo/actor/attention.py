"""Core attention for packed rows without Transformer Engine: causal inside every segment, never across.

With context parallelism a rank holds the queries of its own tokens and gathers everybody's keys and values.

Shape letters: T tokens of a row on this rank, H heads on this rank, D head size.
"""

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_jepo.actor.context import SegmentBucket, segment_buckets, to_device

try:  # torch 2.10 and newer
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]

_NAMED_GQA: dict[str, Any] = {}
if varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters:
    _NAMED_GQA = {"enable_gqa": True}  # where it has no name, fewer key heads are simply taken


@dataclass
class PackedRowParams(PackedSeqParams):
    """PackedSeqParams that also say which tokens attend to which: what PackedAttention reads, made when it asks."""

    bounds: Tensor | None = None
    """[segments + 1] int32 on the host, from 0 to T."""
    device: torch.device = torch.device("cpu")
    context_group: dist.ProcessGroup | None = None
    """Ranks that share the row."""

    @cached_property
    def buckets(self) -> list[SegmentBucket]:
        """The row's segments by length, for one call of attention each."""
        assert self.bounds is not None
        place = (0, 1) if self.context_group is None else (self.context_group.rank(), self.context_group.size())
        return [bucket.to(self.device) for bucket in segment_buckets(self.bounds, *place)]

    @cached_property
    def order(self) -> Tensor:
        """[T] int64: where each token's query lies when the buckets' queries stand one after the other."""
        return torch.cat([bucket.tokens for bucket in self.buckets]).argsort()

    @cached_property
    def bounds_on_device(self) -> Tensor:
        """The bounds, for a kernel."""
        assert self.bounds is not None
        return to_device(self.bounds, self.device)


class PackedAttention(torch.nn.Module):
    """softmax(Q K^T / sqrt(D) + causal mask) V within each segment of a packed (THD) row.

    Grouped-query attention is native; there is no dropout: policy-gradient training must score and train one policy.
    In half precision on a GPU torch's flash attention takes the row as it is; elsewhere, and with context parallelism,
    SDPA serves segments of similar length together. No call waits for the device.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_: object
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedRowParams | None = None,
        **_: object,
    ) -> Tensor:
        """Attention output [T, H * D] of query [T, H, D] and key, value [T, H_kv, D]."""
        assert packed_seq_params is not None, "the actor feeds packed rows only"
        group = packed_seq_params.context_group
        if group is not None and group.size() > 1:
            key, value = (
                gather_from_sequence_parallel_region(tensor, tensor_parallel_output_grad=True, group=group)
                for tensor in (key.contiguous(), value.contiguous())
            )
        elif has_flash_attention(query):
            return self._flash(query, key, value, packed_seq_params)
        return self._buckets(query, key, value, packed_seq_params)

    def _flash(self, query: Tensor, key: Tensor, value: Tensor, row: PackedRowParams) -> Tensor:
        bounds, longest = row.bounds_on_device, row.max_seqlen_q
        causal = {"window_size": (-1, 0), "scale": self.softmax_scale} | _NAMED_GQA
        output = varlen_attn(query, key, value, bounds, bounds, longest, longest, **causal)
        assert isinstance(output, Tensor), "nothing beside the output was asked for"
        return output.flatten(1)

    def _buckets(self, query: Tensor, key: Tensor, value: Tensor, row: PackedRowParams) -> Tensor:
        contexts = []
        for bucket in row.buckets:
            # Right padding: a real query never sees a padded key under the causal mask.
            q = query[bucket.queries.clamp_min(0)].transpose(1, 2)
            k, v = (tensor[bucket.keys.clamp_min(0)].transpose(1, 2) for tensor in (key, value))
            context = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=bucket.mask, is_causal=bucket.mask is None, enable_gqa=True, scale=self.softmax_scale
            )
            contexts.append(context.transpose(1, 2).flatten(0, 1)[bucket.slots])
        return torch.cat(contexts)[row.order].flatten(1)


def has_flash_attention(query: Tensor) -> bool:
    """Whether torch's flash attention serves this query: Ampere or newer, half precision, heads of up to 256."""
    return (
        varlen_attn is not None
        and query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )
