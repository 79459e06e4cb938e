"""Core attention for packed rows without Transformer Engine: causal SDPA inside every segment, never across.

Shape letters: T tokens of a row, S tokens of a segment, H heads on this rank, D head size.
"""

from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


@dataclass
class BucketedSeqParams(PackedSeqParams):
    """PackedSeqParams that also carry, for every group of similar segments, the row positions they occupy."""

    buckets: list[Tensor] = field(default_factory=list)
    """Each [segments, longest] int64: row position of every token; -1 past a segment's end."""


def segment_buckets(cu_seqlens: Tensor) -> list[Tensor]:
    """Row positions of the segments, grouped so that padding inside a group less than doubles its tokens.

    Segments whose lengths round up to the same power of two share a group, so one SDPA call serves all of them:
    a row of 50 short sequences costs one call a layer, not 50.

    Args:
        cu_seqlens: [segments + 1] int, from 0 to T.
    Returns:
        Each [segments of the group, longest of the group] int64, -1 past a segment's end.
    """
    groups: dict[int, list[tuple[int, int]]] = {}
    bounds = cu_seqlens.tolist()
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        groups.setdefault((end - start - 1).bit_length(), []).append((start, end))
    buckets = []
    for _, spans in sorted(groups.items()):
        starts = torch.tensor([start for start, _ in spans])[:, None]
        lengths = torch.tensor([end - start for start, end in spans])[:, None]
        offsets = torch.arange(int(lengths.max()))
        buckets.append(torch.where(offsets < lengths, starts + offsets, -1))
    return buckets


class PackedAttention(torch.nn.Module):
    """softmax(Q K^T / sqrt(D) + causal mask) V within each segment of a packed (THD) row.

    Grouped-query attention is native; there is no dropout: policy-gradient training must score and train one policy.
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
        packed_seq_params: BucketedSeqParams | None = None,
        **_: object,
    ) -> Tensor:
        """Attention output [T, H * D] of query [T, H, D] and key, value [T, H_kv, D]."""
        assert packed_seq_params is not None, "the actor feeds packed rows only"
        output = torch.zeros_like(query)
        for positions in packed_seq_params.buckets:
            inside = positions >= 0
            where = positions.clamp_min(0)
            # Right padding: a real query never sees a padded key under the causal mask.
            q, k, v = (tensor[where].transpose(1, 2) for tensor in (query, key, value))
            context = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True, scale=self.softmax_scale
            )
            output = output.index_put((positions[inside],), context.transpose(1, 2)[inside])
        return output.flatten(1)
