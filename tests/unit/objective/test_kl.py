"""KL estimates against the exact KL of an enumerated policy. Which gradient each loss has: test_exact_gradients.py."""

import math

import pytest
import torch

from nemo_jepo.objective.kl import KL_GRADIENTS, k1_estimate, k2_estimate, k3_estimate, k3_token_gradient
from tests.unit.objective.tabular import CHAINS, TabularPolicy


def log_ratios() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Probability and per-token log-ratio of every chain of thought."""
    policy, reference = TabularPolicy(seed=1), TabularPolicy(seed=2)
    probability = torch.stack([policy.chain_logprobs(c).sum().exp() for c in CHAINS]).detach()
    return probability, [(policy.chain_logprobs(c) - reference.chain_logprobs(c)).detach() for c in CHAINS]


def test_k1_and_k3_are_unbiased_and_k3_varies_less():
    """E[sum_t r_t] = sum_c pi(c) log(pi(c) / pi_ref(c)) is the definition of the KL; k3 must have the same mean."""
    probability, ratios = log_ratios()
    k1 = torch.stack([k1_estimate(r) for r in ratios])
    k3 = torch.stack([k3_estimate(r) for r in ratios])
    exact = (probability * torch.stack([r.sum() for r in ratios])).sum()
    torch.testing.assert_close((probability * k1).sum(), exact)
    torch.testing.assert_close((probability * k3).sum(), exact)
    variance = [(probability * (k - exact).square()).sum() for k in (k1, k3)]
    assert variance[1] < variance[0]
    assert (k3 >= 0).all()


@pytest.mark.parametrize("estimate", [k2_estimate, k3_estimate])
def test_k2_and_k3_agree_to_second_order(estimate):
    """exp(-r) - 1 + r = r^2 / 2 - r^3 / 6 + ..."""
    ratio = torch.tensor([1e-3, -2e-3], dtype=torch.float64)
    torch.testing.assert_close(estimate(ratio), ratio.square().sum() / 2, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("name", "loss"),
    [("k2_token", k2_estimate), ("k3_token", k3_estimate), ("k2_sequence", lambda r: r.sum().square() / 2)],
)
def test_each_gradient_is_that_of_its_loss(name, loss):
    ratio = torch.tensor([0.3, -1.2, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    (exact,) = torch.autograd.grad(loss(ratio), ratio)
    torch.testing.assert_close(KL_GRADIENTS[name](ratio.detach()), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_is_bounded_below_a_log_ratio_of_minus_20_and_exact_above(dtype):
    """g = 1 - exp(-r): 1 - exp(20) from -20 down, 1 far above 0; the estimate adds r to exp(20) - 1."""
    ratio = torch.tensor([1e4, 120.0, 0.0, -19.0, -20.0, -120.0, -1e4], dtype=dtype)
    floor = 1 - math.exp(20)
    expected = torch.tensor([1, 1, 0, 1 - math.exp(19), floor, floor, floor], dtype=torch.float64)
    torch.testing.assert_close(k3_token_gradient(ratio), expected)
    torch.testing.assert_close(k3_estimate(ratio.unsqueeze(-1)), ratio.double() - expected)


def test_estimates_reduce_the_last_dimension_alone():
    ratio = torch.tensor([[0.1, 0.2, 0.3], [1.0, 0.0, -1.0]], dtype=torch.float64)
    for estimate in (k1_estimate, k2_estimate, k3_estimate):
        torch.testing.assert_close(estimate(ratio), torch.stack([estimate(row) for row in ratio]))


def test_equal_policies_have_no_divergence_and_no_gradient():
    zero = torch.zeros(3)
    for function in (k1_estimate, k2_estimate, k3_estimate, *KL_GRADIENTS.values()):
        assert (function(zero) == 0).all()
