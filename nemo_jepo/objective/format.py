"""What teaches a policy the form of a completion, chain, marker, answer, end of turn: objective.format_loss.

    marker_and_end   the paper's reward, and cross-entropy of the end-of-turn token behind the reference answer
    paper            a reward of -10 without the marker, as an advantage of every sampled token
    none             nothing

P prompts, G samples per prompt. Each form gives two tables: the raw advantage of the sampled tokens, which is scaled
and clipped like any other, and the weight of log pi(e | x, c_i, a*), e the end of turn, within a prompt, before its
mean over n samples.

Why the end is taught: generation stops at the marker, so nothing that is sampled shows where an answer ends, and a
policy that learns not to end its turn before the marker unlearns to end it behind the answer too. The supervised term
would hold on to it, but a small beta_sup does not, and a large one teaches right answers behind wrong chains. The
end of turn is the same behind either (docs/results-real.md).

Scaling makes the reward for the marker as strong as the likelihood's whatever the penalty is; format_weight weakens it.
It rewards whatever reaches the marker, and the shortest chain does so most surely.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_jepo.objective.estimators import leave_one_out_advantage

PAPER_PENALTY = 10.0
"""p of App. B.2. It is divided out again where advantages are scaled by their std."""


class FormatTerms(NamedTuple):
    """What a form says of each sample, [P, G] float64."""

    advantage: Tensor
    """Raw, of the sampled tokens."""
    end_weight: Tensor
    """Of the end-of-turn token behind the reference answer."""


def marker_reward(has_marker: Tensor, arrived_mask: Tensor, ends_mask: Tensor) -> FormatTerms:
    """Leave-one-out advantage of the format reward: 0 with the answer marker, -p without.

    It falls on c_i where there is a marker and on all of y_i where there is none; no token after the marker can change
    the reward.

    Args:
        has_marker: [P, G] bool; anything where not arrived.
        arrived_mask: [P, G] bool, False = failed.
        ends_mask: not read.
    Returns:
        The advantage, 0 where not arrived, alone, or where all of a prompt are alike; and no weight.
    Raises:
        ValueError: shapes differ, or the mask is not bool.
    Source: arXiv 2503.19618, App. B.2.
    """
    reward = -PAPER_PENALTY * (~has_marker).double()
    return FormatTerms(leave_one_out_advantage(reward, arrived_mask), torch.zeros_like(reward))


def marker_and_end(has_marker: Tensor, arrived_mask: Tensor, ends_mask: Tensor) -> FormatTerms:
    """`marker_reward`, and the log-prob of ending the turn behind the reference answer.

        sum_i ends_i log pi(e | x, c_i, a*),  c_i and a* held fixed

    Args:
        has_marker: as there.
        arrived_mask: as there.
        ends_mask: [P, G] bool: scored as x + c_i + a* + e.
    Returns:
        The advantage; and weight 1 where a turn ends.
    """
    advantage, _ = marker_reward(has_marker, arrived_mask, ends_mask)
    return FormatTerms(advantage, (ends_mask & arrived_mask).double())


def nothing(has_marker: Tensor, arrived_mask: Tensor, ends_mask: Tensor) -> FormatTerms:
    """Neither advantage nor weight: only the bound's own terms ask for marker and end."""
    zero = torch.zeros(arrived_mask.shape, dtype=torch.float64, device=arrived_mask.device)
    return FormatTerms(zero, zero)


FORMAT_TERMS: dict[str, Callable[[Tensor, Tensor, Tensor], FormatTerms]] = {
    "marker_and_end": marker_and_end,
    "paper": marker_reward,
    "none": nothing,
}
"""objective.format_loss -> (has_marker, arrived_mask, ends_mask) -> terms."""
