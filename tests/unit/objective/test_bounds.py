"""Bounds of hand-made groups; the expected values are written out or come from autograd."""

import math

import pytest
import torch

from nemo_jepo.objective.estimators import bound_weights, effective_sample_size, multi_sample_bound, single_sample_bound
from tests.unit.objective.tabular import CHAINS, REFERENCE_ANSWER, TabularPolicy

ALL = torch.ones(1, 4, dtype=torch.bool)
FUNCTIONS = (multi_sample_bound, single_sample_bound, bound_weights, effective_sample_size)


def likelihoods(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64).log()


def test_the_multi_sample_bound_is_the_log_of_the_mean_likelihood():
    bound = multi_sample_bound(likelihoods(0.1, 0.2, 0.3, 0.2), ALL)
    torch.testing.assert_close(bound, torch.tensor([math.log(0.2)], dtype=torch.float64))


def test_the_single_sample_bound_is_the_mean_log_likelihood():
    bound = single_sample_bound(likelihoods(0.1, 0.2, 0.4, 0.8), ALL)
    torch.testing.assert_close(bound, torch.tensor([math.log(0.1 * 0.2 * 0.4 * 0.8) / 4], dtype=torch.float64))


def test_the_bounds_are_ordered_and_meet_when_all_samples_are_equal():
    """L_1 <= L_n by Jensen, equal for equal samples."""
    spread = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.ones_like(spread, dtype=torch.bool)
    assert (single_sample_bound(spread, mask) < multi_sample_bound(spread, mask)).all()
    equal = torch.full((1, 4), -1e4, dtype=torch.float64)
    torch.testing.assert_close(multi_sample_bound(equal, ALL), single_sample_bound(equal, ALL), rtol=0, atol=1e-10)


def test_the_expected_bound_tightens_with_the_number_of_samples():
    """Every group of the tabular policy enumerated: L_1 < L_2 < L_3 < log pi(a*|x)."""
    policy = TabularPolicy(seed=3)
    probability = torch.stack([policy.chain_logprobs(c).sum().exp() for c in CHAINS]).detach()
    answer_logprob = torch.stack([policy.answer_logprob(c) for c in CHAINS]).detach()
    expected = []
    for size in (1, 2, 3):
        groups = torch.cartesian_prod(*[torch.arange(len(CHAINS))] * size).view(-1, size)
        bound = multi_sample_bound(answer_logprob[groups], torch.ones_like(groups, dtype=torch.bool))
        expected.append(float((probability[groups].prod(-1) * bound).sum()))
    ceiling = float((probability * answer_logprob.exp()).sum().log())
    assert expected[0] < expected[1] < expected[2] < ceiling


def test_the_bound_is_not_the_misprint_of_the_paper():
    """App. B.2 prints log(1/n sum_j sum_t pi(a*_t)), which for an answer of two likely tokens even exceeds log 1."""
    policy = TabularPolicy(seed=3)
    token_logprobs = torch.stack([policy.answer_logprobs(c, REFERENCE_ANSWER) for c in CHAINS[:3]]).detach()
    bound = multi_sample_bound(token_logprobs.sum(-1).unsqueeze(0), torch.ones(1, 3, dtype=torch.bool))
    products = [float(tokens.exp().prod()) for tokens in token_logprobs]
    torch.testing.assert_close(bound.item(), math.log(sum(products) / 3))
    misprint = token_logprobs.exp().sum(-1).mean().log()
    assert abs(bound.item() - misprint.item()) > 0.1

    likely = torch.tensor([[0.9, 0.9]]).log()
    assert likely.exp().sum(-1).mean().log() > 0 > multi_sample_bound(likely.sum(-1, keepdim=True), ALL[:, :1])


def test_the_weights_are_the_gradient_of_the_bound():
    answer_logprob = torch.tensor([[-1.0, -2.5, -0.3, -4.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False, True]])
    (exact,) = torch.autograd.grad(multi_sample_bound(answer_logprob, mask).sum(), answer_logprob)
    torch.testing.assert_close(bound_weights(answer_logprob, mask), exact)
    assert not bound_weights(answer_logprob, mask).requires_grad


def test_the_effective_sample_size_counts_the_samples_that_share_the_bound():
    """Equal: all of them. One dominant: 1. Weights (1/2, 1/4, 1/4): 1 / (1/4 + 1/16 + 1/16) = 8/3."""
    groups = torch.tensor([[-7.0, -7.0, -7.0, -7.0], [0.0, -1e4, -1e4, -1e4]], dtype=torch.float64)
    sizes = effective_sample_size(groups, ALL.expand(2, 4))
    torch.testing.assert_close(sizes, torch.tensor([4.0, 1.0], dtype=torch.float64))
    sizes = effective_sample_size(likelihoods(0.4, 0.2, 0.2, 0.1), torch.tensor([[True, True, True, False]]))
    torch.testing.assert_close(sizes, torch.tensor([8 / 3], dtype=torch.float64))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
def test_what_stands_at_an_invalid_position_changes_no_value_and_no_gradient(function, junk):
    mask = torch.tensor([[True, False, True, True], [False, False, False, False]])
    clean = torch.tensor([[-1.0, 0.0, -3.0, -2.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    dirty = torch.where(mask, clean, junk).requires_grad_()
    clean.requires_grad_()
    torch.testing.assert_close(function(dirty, mask), function(clean, mask), rtol=0, atol=0)
    if function in (multi_sample_bound, single_sample_bound):
        gradients = [torch.autograd.grad(function(x, mask).sum(), x)[0] for x in (dirty, clean)]
        torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
        assert (gradients[0][~mask] == 0).all()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_group_without_a_valid_sample_is_zero(function):
    result = function(torch.full((2, 3), math.nan), torch.zeros(2, 3, dtype=torch.bool))
    assert torch.equal(result, torch.zeros_like(result))


def test_one_valid_sample_makes_both_bounds_its_own_log_prob():
    mask = torch.tensor([[False, True, False]])
    answer_logprob = torch.tensor([[math.nan, -12.5, math.nan]])
    assert multi_sample_bound(answer_logprob, mask).item() == single_sample_bound(answer_logprob, mask).item() == -12.5


def test_very_unlikely_answers_keep_a_finite_bound():
    bound = multi_sample_bound(torch.tensor([[-1e4, -1e4 - 3]], dtype=torch.float64), ALL[:, :2])
    torch.testing.assert_close(bound, torch.tensor([-1e4 + math.log((1 + math.exp(-3)) / 2)], dtype=torch.float64))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_result_has_the_dtype_of_the_log_probs(function):
    assert function(torch.zeros(1, 4), ALL).dtype == torch.float32


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("answer_logprob", "mask"),
    [(torch.zeros(2, 3), torch.ones(2, 4, dtype=torch.bool)), (torch.zeros(2, 3), torch.ones(2, 3))],
)
def test_a_mask_of_another_shape_or_kind_is_refused(function, answer_logprob, mask):
    with pytest.raises(ValueError, match="bool mask of the same shape"):
        function(answer_logprob, mask)
