"""Importance ratios between the policy that is trained and the sampler that drew the tokens.

T tokens that carry a policy gradient. The sampler may hold older weights or compute in another precision, and reports
log-probs at its own temperature. Truncation from above bounds the variance; ratios below 1 pass.
"""

import torch
from torch import Tensor


def token_truncated(policy_logprobs: Tensor, generation_logprobs: Tensor, cap: float) -> Tensor:
    """min(pi(y_t) / mu(y_t), cap) of each token: little variance, ignores how prefixes differ.

    Args:
        policy_logprobs: [T] nats, by the weights that are updated.
        generation_logprobs: [T] nats, as the sampler reported them.
        cap: largest ratio.
    Returns:
        [T], detached.
    Source: truncated importance sampling, Ionides 2008; rho-bar of arXiv 1802.01561 (IMPALA).
    """
    return (policy_logprobs - generation_logprobs).detach().exp().clamp(max=cap)


def sequence_truncated(policy_logprobs: Tensor, generation_logprobs: Tensor, cap: float) -> Tensor:
    """min(prod_t pi(y_t) / mu(y_t), cap) on every token: unbiased below the cap.

    Args:
        policy_logprobs: [T] nats, by the weights that are updated.
        generation_logprobs: [T] nats, as the sampler reported them.
        cap: largest ratio.
    Returns:
        [T], detached.
    """
    log_ratio = (policy_logprobs - generation_logprobs).detach()
    return log_ratio.sum().exp().clamp(max=cap).expand_as(log_ratio)


def no_correction(policy_logprobs: Tensor, generation_logprobs: Tensor, cap: float) -> Tensor:
    """1 on every token."""
    return torch.ones_like(policy_logprobs)


IMPORTANCE_RATIOS = {
    "none": no_correction,
    "token_truncated": token_truncated,
    "sequence_truncated": sequence_truncated,
}
"""objective.importance_sampling -> ratio."""
