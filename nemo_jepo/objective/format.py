"""What teaches a policy to write the answer marker: the forms of objective.format_loss.

    close   cross-entropy of the marker behind a completion that ended by itself without one
    paper   a reward of -10 without the marker, as an advantage of every sampled token
    none    nothing

P prompts, G samples per prompt. Each form gives two tables: the raw advantage of the sampled tokens, which is scaled
and clipped like any other, and the weight of log pi(marker | x, y_i) within a prompt, before its mean over n samples.

The paper's form rewards whatever reaches the marker, and the shortest chain reaches it most surely. Its std and its
clip make it as strong as the reward whatever the penalty is. `close` puts no weight on a chain's tokens: at the end of
a chain it raises the marker over the end-of-turn token. A small model says it earlier all the same, because what it
learns there holds for other prefixes too (docs/results-real.md).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nemo_jepo.objective.estimators import leave_one_out_advantage

PAPER_PENALTY = 10.0
"""p of App. B.2. It is divided out again where advantages are scaled by their std."""

FormatTerms = tuple[Tensor, Tensor]
"""(raw advantage of the sampled tokens, weight of the marker behind a closed sample), both [P, G] float64."""


def marker_reward(has_marker: Tensor, arrived_mask: Tensor, closed_mask: Tensor) -> FormatTerms:
    """Leave-one-out advantage of the format reward: 0 with the answer marker, -p without.

    It falls on c_i where there is a marker and on all of y_i where there is none; no token after the marker can change
    the reward.

    Args:
        has_marker: [P, G] bool; anything where not arrived.
        arrived_mask: [P, G] bool, False = failed.
        closed_mask: not read.
    Returns:
        The advantage, 0 where not arrived, alone, or where all of a prompt are alike; and no marker weight.
    Raises:
        ValueError: shapes differ, or the mask is not bool.
    Source: arXiv 2503.19618, App. B.2.
    """
    reward = -PAPER_PENALTY * (~has_marker).double()
    return leave_one_out_advantage(reward, arrived_mask), torch.zeros_like(reward)


def close(has_marker: Tensor, arrived_mask: Tensor, closed_mask: Tensor) -> FormatTerms:
    """The marker's log-prob at the end of each completion that ended by itself without it.

        sum_i closed_i log pi(m | x, y_i),  y_i without its end-of-turn token, held fixed

    Args:
        has_marker: not read.
        arrived_mask: [P, G] bool, False = failed.
        closed_mask: [P, G] bool: scored as x + y_i + m.
    Returns:
        No advantage; and weight 1 where closed.
    """
    weight = (closed_mask & arrived_mask).double()
    return torch.zeros_like(weight), weight


def nothing(has_marker: Tensor, arrived_mask: Tensor, closed_mask: Tensor) -> FormatTerms:
    """Neither advantage nor weight: only the bound's own terms ask for the marker."""
    zero = torch.zeros(arrived_mask.shape, dtype=torch.float64, device=arrived_mask.device)
    return zero, zero


FORMAT_TERMS: dict[str, Callable[[Tensor, Tensor, Tensor], FormatTerms]] = {
    "close": close,
    "paper": marker_reward,
    "none": nothing,
}
"""objective.format_loss -> (has_marker, arrived_mask, closed_mask) -> terms."""
