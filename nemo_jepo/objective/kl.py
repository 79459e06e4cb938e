"""KL(pi, pi_ref) of the chain of thought, and importance ratios between pi and the sampler's mu.

T tokens of one chain, r_t = log pi(c_t|.) - log pi_ref(c_t|.) in nats, c sampled from pi. An estimate and a loss are
different things: two losses with the same mean can have different gradients. Here a loss is given by the coefficients
g_t of its gradient, sum_t g_t grad log pi(c_t|.), because that is all an optimizer step sees.
"""

from collections.abc import Callable

import torch
from torch import Tensor

K3_LARGEST_EXPONENT = 20.0
"""Nats: k3 reads log-ratios below -20 as -20, so that no weight is above exp(20) = 4.9e8. exp(-r_t) of a token that the
policy has all but given up overflows float32 at r_t = -89 and float64 at -710. On samples of the policy the bound is
met with probability below exp(-20) = 2.1e-9 a token. Source: NeMo RL and verl, which clamp at 20 too."""


def excess_ratio(log_ratio: Tensor) -> Tensor:
    """pi_ref / pi - 1 = exp(-r) - 1 of each token, r bounded from below by -K3_LARGEST_EXPONENT.

    Args:
        log_ratio: [..., T] nats.
    Returns:
        [..., T] float64, at most exp(20) - 1.
    """
    return torch.expm1((-log_ratio.double()).clamp(max=K3_LARGEST_EXPONENT))


def k1_estimate(log_ratio: Tensor) -> Tensor:
    """Unbiased estimate of the sequence's KL: sum_t r_t. What is reported as the KL; may be negative.

    Args:
        log_ratio: [..., T] nats.
    Returns:
        [...] nats.
    """
    return log_ratio.sum(-1)


def k2_estimate(log_ratio: Tensor) -> Tensor:
    """Half the squared log-ratios, sum_t r_t^2 / 2: biased, never negative, right to second order.

    Args:
        log_ratio: [..., T] nats.
    Returns:
        [...] nats.
    """
    return log_ratio.square().sum(-1) / 2


def k3_estimate(log_ratio: Tensor) -> Tensor:
    """Unbiased estimate of the sequence's KL with less variance: sum_t exp(-r_t) - 1 + r_t, never negative.

    Unbiased because E[exp(-r_t)] = 1 after every prefix, up to the bound of `excess_ratio`.

    Args:
        log_ratio: [..., T] nats.
    Returns:
        [...] float64, nats.
    """
    return (excess_ratio(log_ratio) + log_ratio).sum(-1)


def k2_token_gradient(log_ratio: Tensor) -> Tensor:
    """g_t = r_t, the gradient of sum_t r_t^2 / 2.

    Its mean is sum_t E_{s ~ pi}[ grad KL(pi(.|s), pi_ref(.|s)) ] with the distribution of the prefixes s held fixed:
    each token answers for its own divergence, not for the states that it leads to. Less variance; the default.

    Args:
        log_ratio: [T] nats.
    Returns:
        [T].
    """
    return log_ratio


def k2_sequence_gradient(log_ratio: Tensor) -> Tensor:
    """g_t = sum_u r_u for every t, the gradient of (sum_t r_t)^2 / 2.

    Its mean is exactly grad KL(pi(c), pi_ref(c)), the reverse KL of the sequence: E[R grad log pi(c)] with
    R = sum_u r_u, and E[grad R] = 0.

    Args:
        log_ratio: [T] nats.
    Returns:
        [T].
    """
    return log_ratio.sum().expand_as(log_ratio)


def k3_token_gradient(log_ratio: Tensor) -> Tensor:
    """g_t = 1 - exp(-r_t), the gradient of sum_t exp(-r_t) - 1 + r_t; never below 1 - exp(20), see `excess_ratio`.

    Its mean is sum_t E_{s ~ pi}[ grad KL(pi_ref(.|s), pi(.|s)) ], prefixes held fixed: the gradient of the FORWARD KL
    of each token, although the value estimates the reverse one.

    Args:
        log_ratio: [T] nats.
    Returns:
        [T] float64.
    """
    return -excess_ratio(log_ratio)


KL_GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "k2_token": k2_token_gradient,
    "k2_sequence": k2_sequence_gradient,
    "k3_token": k3_token_gradient,
    "k1_reward": torch.zeros_like,  # acts through the advantage
}
"""kl.estimator -> g_t of the loss."""


# ---- importance ratios: the sampler may hold older weights, compute in another precision, and draw at another
# temperature. mu is what the tokens were drawn from, its temperature included, and pi the policy at temperature 1, so
# that the ratio corrects for all three. Truncation from above bounds the variance; ratios below 1 pass. -------------


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
