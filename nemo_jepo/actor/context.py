"""Context parallelism: which tokens of a packed row a rank holds.

A segment is cut into 2 C equal parts and rank r of C holds parts r and 2 C - 1 - r, so that causal attention costs
every rank the same. Transformer Engine deals packed rows the same way (thd_get_partitioned_indices), and Megatron's
rotary embedding expects it. `packing` pads segments to a multiple of 2 C.

Shape letters: T tokens of a row, C context-parallel ranks.
"""

import torch
from torch import Tensor


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
