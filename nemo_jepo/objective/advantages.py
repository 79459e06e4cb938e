"""How much each sample did better than its siblings, and how that is scaled.

P prompts, G samples per prompt. Every advantage is detached: a credit, never a path for gradient. A baseline never
reads the sample it is subtracted from, so it leaves the mean alone and lowers the variance. docs/objective.md has the
proofs.
"""

import math

import torch
from torch import Tensor

from nemo_jepo.objective.groups import in_dtype_of, masked, share

ADVANTAGE_EPSILON = 1e-6
"""Added to the std. A batch of equal samples leaves rounding in its advantages, about 1e-12 in float64 at -1e4 nats,
which a smaller epsilon would scale up to credits of full size; a difference of 1e-6 nats or reward is below what any
trained precision resolves, so a real signal is never damped."""


def multi_sample_advantage(answer_logprob: Tensor, valid_mask: Tensor) -> Tensor:
    """How much each valid sample raises the multi-sample bound of its own group.

        A_i = L_m(all) - L_{m-1}(all but i) >= log((m-1)/m);  0 where invalid or alone

    Args:
        answer_logprob: [P, G] float, nats; anything where invalid.
        valid_mask: [P, G] bool.
    Returns:
        [P, G], nats, detached. Not zero-mean, and heavy-tailed: one good sample of a long answer takes all.
    Raises:
        ValueError: shapes differ, or the mask is not bool.
    Source: arXiv 2503.19618, Eq. 7, R - v_i.
    """
    num_valid = valid_mask.sum(-1, keepdim=True)
    logprob = masked(answer_logprob.detach(), valid_mask).masked_fill(~valid_mask, -math.inf)
    own = torch.eye(valid_mask.shape[-1], dtype=torch.bool, device=valid_mask.device)
    others = logprob.unsqueeze(-2).masked_fill(own, -math.inf)  # [P, G, G]
    bound = torch.logsumexp(logprob, dim=-1, keepdim=True) - num_valid.double().log()
    bound_without = torch.logsumexp(others, dim=-1) - (num_valid - 1).double().log()
    return in_dtype_of(torch.where(valid_mask & (num_valid > 1), bound - bound_without, 0.0), answer_logprob)


def leave_one_out_advantage(reward: Tensor, valid_mask: Tensor) -> Tensor:
    """Each valid sample's reward above the mean of the other valid samples.

        A_i = r_i - mean_{j != i} r_j = m/(m-1) * (r_i - mean_j r_j);  0 where invalid or alone

    Args:
        reward: [P, G], any unit; anything where invalid. With r_i = l_i this is Eq. 5's l_i - v_i.
        valid_mask: [P, G] bool.
    Returns:
        [P, G], detached, in the reward's unit; a row sums to 0.
    Raises:
        ValueError: shapes differ, or the mask is not bool.
    Source: arXiv 2503.19618, Eq. 5; arXiv 2402.14740 (RLOO).
    """
    values = masked(reward.detach(), valid_mask)
    num_valid = valid_mask.sum(-1, keepdim=True)
    centred = values - values.sum(-1, keepdim=True) * share(num_valid)
    advantage = centred * num_valid * share(num_valid - 1)
    return in_dtype_of(torch.where(valid_mask, advantage, 0.0), reward)


def probability_advantage(answer_logprob: Tensor, valid_mask: Tensor, log_scale: Tensor) -> Tensor:
    """Leave-one-out advantage of the answer's probability, in units of exp(log_scale).

        A_i = exp(l_i - s) - mean_{j != i} exp(l_j - s),  s = log_scale

    exp(l_i) itself underflows for long answers. With s the largest l of the global batch the best sample has reward 1,
    and dividing by the std afterwards cancels s.

    Args:
        answer_logprob: [P, G] float, nats; anything where invalid.
        valid_mask: [P, G] bool.
        log_scale: scalar, nats; 0 gives the probability itself.
    Returns:
        [P, G], detached, probability / exp(log_scale).
    Raises:
        ValueError: shapes differ, or the mask is not bool.
    Source: arXiv 2503.19618, Eq. 10; arXiv 2505.21493 (VeriFree).
    """
    probability = masked(answer_logprob.detach() - log_scale, valid_mask).exp()
    return in_dtype_of(leave_one_out_advantage(probability, valid_mask), answer_logprob)


def format_advantage(has_marker: Tensor, arrived_mask: Tensor, penalty: float) -> Tensor:
    """Leave-one-out advantage of the format reward: 0 with the answer marker, -penalty without.

    Args:
        has_marker: [P, G] bool; anything where not arrived.
        arrived_mask: [P, G] bool, False = failed.
        penalty: p >= 0; 0 switches the format loss off.
    Returns:
        [P, G] float64, detached; 0 where not arrived or alone.
    Raises:
        ValueError: shapes differ, or the mask is not bool.
    Source: arXiv 2503.19618, App. B.2.
    """
    return leave_one_out_advantage(-penalty * (~has_marker).double(), arrived_mask)


def moments(advantage: Tensor, mask: Tensor) -> Tensor:
    """Count, sum and sum of squares over the mask: [3] float64, to be added over data-parallel ranks.

    Raises:
        ValueError: shapes differ, or the mask is not bool.
    """
    values = masked(advantage, mask)
    return torch.stack([mask.sum().double(), values.sum(), values.square().sum()])


def std_from_moments(total: Tensor) -> Tensor:
    """Population standard deviation of everything that was counted.

        std = sqrt( S2/N - (S1/N)^2 );  0 when nothing was counted

    Args:
        total: [3] float64, the sum of `moments` over ranks.
    Returns:
        scalar float64, in the advantage's unit.
    """
    inverse = share(total[0])
    return (total[2] * inverse - (total[1] * inverse).square()).clamp(min=0.0).sqrt()


def group_std(advantage: Tensor, mask: Tensor) -> Tensor:
    """Population standard deviation within each group: [P, 1] float64, 0 where nothing counts.

    Raises:
        ValueError: shapes differ, or the mask is not bool.
    """
    values = masked(advantage, mask)
    inverse = share(mask.sum(-1, keepdim=True))
    deviation = masked(values - values.sum(-1, keepdim=True) * inverse, mask)
    return (deviation.square().sum(-1, keepdim=True) * inverse).sqrt()


def scale_and_clip(advantage: Tensor, std: Tensor | float, clip: float) -> Tensor:
    """The advantage in units of its std, bounded; its mean is not subtracted.

        clip( A / (std + epsilon), -clip, clip )

    Args:
        advantage: [P, G].
        std: scalar, or [P, 1], >= 0; `ADVANTAGE_EPSILON` is added.
        clip: largest magnitude, > 0.
    Returns:
        [P, G], no unit.
    Source: arXiv 2503.19618, App. B.2.
    """
    return (advantage / (std + ADVANTAGE_EPSILON)).clamp(-clip, clip)
