"""Arithmetic over the samples of a group of which only some count.

P prompts, G samples per prompt. Whatever stands where the mask is False (NaN and infinities too) is replaced before any
arithmetic, so it reaches neither a value nor a gradient. Sums run in float64: log-probs of long answers lie near -1e4
nats, where float32 keeps three decimals and differences between samples, which are all that matters, would be noise.
"""

import torch
from torch import Tensor


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """The values in float64, 0 where the mask is False; gradient flows where it is True.

    Args:
        values: [P, G], any dtype; anything, NaN included, where the mask is False.
        mask: [P, G] bool, True = counts.
    Returns:
        [P, G] float64.
    Raises:
        ValueError: the shapes differ or are not [P, G], or the mask is not bool.
    """
    if values.ndim != 2 or values.shape != mask.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"needs values [P, G] and a bool mask of the same shape, got {list(values.shape)} {values.dtype} "
            f"and {list(mask.shape)} {mask.dtype}"
        )
    return torch.where(mask, values, torch.zeros_like(values)).double()


def share(count: Tensor) -> Tensor:
    """1 / count as float64, and 0 where nothing was counted: an empty mean is 0."""
    return torch.where(count > 0, 1.0 / count.double().clamp(min=1.0), 0.0)


def in_dtype_of(result: Tensor, values: Tensor) -> Tensor:
    """The float64 result in the caller's floating dtype; it stays float64 for integer or bool input."""
    return result.to(values.dtype) if values.is_floating_point() else result
