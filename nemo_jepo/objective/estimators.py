"""Estimates from a group of sampled chains of thought: bounds on log pi(a*|x), and each sample's advantage.

P prompts, G samples per prompt, m valid samples of a group. l_i = log pi(a*|x, c_i) is the SUM of the answer's token
log-probs, in nats; a mean over tokens would bound something else. Every advantage is detached: a number, never a path
for gradient. A baseline never reads the sample it is subtracted from, so it leaves the mean alone and lowers the
variance. docs/concepts/objective.md has the proofs.

Whatever stands where a mask is False (NaN and infinities too) is replaced before any arithmetic, so it reaches neither
a value nor a gradient. Sums run in float64: log-probs of long answers lie near -1e4 nats, where float32 keeps three
decimals and differences between samples, which are all that matters, would be noise.
"""

import math

import torch
from torch import Tensor

ADVANTAGE_EPSILON = 1e-6
"""Added to the std. A batch of equal samples leaves rounding in its advantages, about 1e-12 in float64 at -1e4 nats,
which a smaller epsilon would scale up to advantages of full size; a difference of 1e-6 nats or reward is below what any
trained precision resolves, so a real signal is never damped."""


# ---- masked arithmetic -----------------------------------------------------------------------------------------------


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


def share_of_prompt(mask: Tensor) -> Tensor:
    """1 / n of the samples that count in their prompt, of which there are n; 0 elsewhere: [P, G] float64."""
    return mask * share(mask.sum(-1, keepdim=True))


def in_dtype_of(result: Tensor, values: Tensor) -> Tensor:
    """The float64 result in the caller's floating dtype; it stays float64 for integer or bool input."""
    return result.to(values.dtype) if values.is_floating_point() else result


# ---- bounds ----------------------------------------------------------------------------------------------------------


def multi_sample_bound(answer_logprob: Tensor, valid_mask: Tensor) -> Tensor:
    """Log of the mean answer likelihood over each group's valid samples.

        L_m = logsumexp_i(l_i) - log m        d L_m / d l_i = softmax(l)_i

    Args:
        answer_logprob: [P, G] float, nats; anything where invalid.
        valid_mask: [P, G] bool.
    Returns:
        [P], nats, dtype of answer_logprob; 0 where a group has no valid sample. Gradient flows to valid entries.
    Raises:
        ValueError: shapes differ, or the mask is not bool.
    Source: arXiv 2503.19618, Eq. 6. App. B.2 prints sum_t pi(a*_t) in place of the product: a misprint.
    """
    logprob = masked(answer_logprob, valid_mask).masked_fill(~valid_mask, -math.inf)
    num_valid = valid_mask.sum(-1)
    bound = torch.logsumexp(logprob, dim=-1) - num_valid.double().log()
    return in_dtype_of(torch.where(num_valid > 0, bound, 0.0), answer_logprob)


def single_sample_bound(answer_logprob: Tensor, valid_mask: Tensor) -> Tensor:
    """Mean answer log-prob over each group's valid samples, never above the multi-sample bound.

        L_1 = 1/m * sum_i l_i

    Args:
        answer_logprob: [P, G] float, nats; anything where invalid.
        valid_mask: [P, G] bool.
    Returns:
        [P], nats, dtype of answer_logprob; 0 where a group has no valid sample. Gradient flows to valid entries.
    Raises:
        ValueError: shapes differ, or the mask is not bool.
    Source: arXiv 2503.19618, Eq. 3.
    """
    bound = masked(answer_logprob, valid_mask).sum(-1) * share(valid_mask.sum(-1))
    return in_dtype_of(bound, answer_logprob)


def bound_weights(answer_logprob: Tensor, valid_mask: Tensor) -> Tensor:
    """How much each sample's answer log-prob moves the multi-sample bound.

        w_i = softmax(l)_i over the valid samples, 0 elsewhere;   grad L_m = sum_i w_i grad l_i

    Args:
        answer_logprob: [P, G] float, nats; anything where invalid.
        valid_mask: [P, G] bool.
    Returns:
        [P, G], detached; a row sums to 1, or to 0 without a valid sample.
    Raises:
        ValueError: shapes differ, or the mask is not bool.
    Source: arXiv 2503.19618, Eq. 7, second term.
    """
    logprob = masked(answer_logprob.detach(), valid_mask).masked_fill(~valid_mask, -math.inf)
    return in_dtype_of(torch.where(valid_mask, logprob.softmax(dim=-1), 0.0), answer_logprob)


def mean_weights(score: Tensor, valid_mask: Tensor) -> Tensor:
    """How much each sample's score moves the mean score of its group.

        w_i = 1/m on the valid samples, 0 elsewhere;   grad 1/m sum_i r_i = sum_i w_i grad r_i

    Args:
        score: [P, G] float: r_i, of which only dtype and shape are read.
        valid_mask: [P, G] bool.
    Returns:
        [P, G], detached; a row sums to 1, or to 0 without a valid sample.
    Source: arXiv 2503.19618, Eq. 5, second term.
    """
    return in_dtype_of(share_of_prompt(valid_mask), score)


def effective_sample_size(answer_logprob: Tensor, valid_mask: Tensor) -> Tensor:
    """How many samples share the bound: m when all are equal, 1 when one dominates.

        ESS = 1 / sum_i w_i^2,  w = softmax(l)

    Args:
        answer_logprob: [P, G] float, nats; anything where invalid.
        valid_mask: [P, G] bool.
    Returns:
        [P], in samples, detached; 0 where a group has no valid sample.
    Raises:
        ValueError: shapes differ, or the mask is not bool.
    """
    concentration = bound_weights(answer_logprob.double(), valid_mask).square().sum(-1)
    size = torch.where(concentration > 0, 1.0 / concentration, 0.0)
    return in_dtype_of(size, answer_logprob)


# ---- advantages ------------------------------------------------------------------------------------------------------


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


def no_advantage(reward: Tensor, valid_mask: Tensor) -> Tensor:
    """Chains are neither reinforced nor discouraged: what is left is fine-tuning on the answers behind them.

        A_i = 0

    Args:
        reward: [P, G], of which only dtype and shape are read.
        valid_mask: [P, G] bool.
    Returns:
        [P, G] zeros.
    Source: arXiv 2602.03979, warm start.
    """
    return torch.zeros_like(reward)


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
