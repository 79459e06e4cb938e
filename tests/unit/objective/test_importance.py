"""Importance ratios, written out by hand; that they restore the policy's gradient is in test_exact_gradients.py."""

import pytest
import torch

from nemo_jepo.objective.kl import sequence_truncated, token_truncated

POLICY = torch.tensor([0.5, 0.2, 0.9], dtype=torch.float64).log()
GENERATION = torch.tensor([0.25, 0.4, 0.3], dtype=torch.float64).log()


def test_the_token_ratio_is_capped_token_by_token():
    """2, 1/2, 3 -> 2, 1/2, 2.5."""
    expected = torch.tensor([2.0, 0.5, 2.5], dtype=torch.float64)
    torch.testing.assert_close(token_truncated(POLICY, GENERATION, 2.5), expected)


def test_the_sequence_ratio_is_the_capped_product_on_every_token():
    """2 * 1/2 * 3 = 3."""
    for cap, ratio in ((5.0, 3.0), (2.0, 2.0)):
        expected = torch.full((3,), ratio, dtype=torch.float64)
        torch.testing.assert_close(sequence_truncated(POLICY, GENERATION, cap), expected)


@pytest.mark.parametrize("ratio", [token_truncated, sequence_truncated])
def test_equal_log_probs_need_no_correction_and_a_huge_gap_stays_finite(ratio):
    assert torch.equal(ratio(POLICY, POLICY, 2.0), torch.ones(3, dtype=torch.float64))
    assert torch.equal(ratio(POLICY, POLICY - 1e4, 2.0), torch.full((3,), 2.0, dtype=torch.float64))
    assert torch.equal(ratio(POLICY, POLICY + 1e4, 2.0), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("ratio", [token_truncated, sequence_truncated])
def test_no_gradient_flows_through_a_ratio(ratio):
    assert not ratio(POLICY.clone().requires_grad_(), GENERATION, 2.0).requires_grad
