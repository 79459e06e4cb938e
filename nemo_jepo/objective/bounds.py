"""Jensen bounds on log pi(a*|x), estimated from a group of sampled chains of thought.

P prompts, G samples per prompt, m valid samples of a group. l_i = log pi(a*|x, c_i) is the SUM of the answer's token
log-probs, in nats; a mean over tokens would bound something else. docs/objective.md has the derivation.
"""

import math

import torch
from torch import Tensor

from nemo_jepo.objective.groups import in_dtype_of, masked, share


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
