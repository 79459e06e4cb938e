"""Advantages of hand-made groups against their definitions, written out sample by sample."""

import math
import statistics

import pytest
import torch

from nemo_jepo.objective.estimators import (
    group_std,
    leave_one_out_advantage,
    mean_weights,
    moments,
    multi_sample_advantage,
    multi_sample_bound,
    scale_and_clip,
    single_sample_bound,
    std_from_moments,
)

FUNCTIONS = (multi_sample_advantage, leave_one_out_advantage)


def random_group(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 - 5
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]]).bool()
    return values, mask


def test_the_multi_sample_advantage_is_the_bound_less_the_bound_without_the_sample():
    values, mask = random_group()
    advantage = multi_sample_advantage(values, mask)
    for p, i in mask.nonzero().tolist():
        without = mask[p : p + 1].clone()
        without[0, i] = False
        row = values[p : p + 1]
        expected = multi_sample_bound(row, mask[p : p + 1]) - multi_sample_bound(row, without) if without.any() else 0.0
        torch.testing.assert_close(advantage[p, i].item(), float(expected))
    assert (advantage[~mask] == 0).all()


def test_the_leave_one_out_advantage_is_the_reward_less_the_mean_of_the_others():
    values, mask = random_group()
    advantage = leave_one_out_advantage(values, mask)
    for p, i in mask.nonzero().tolist():
        others = [values[p, j].item() for j in range(4) if mask[p, j] and j != i]
        expected = values[p, i].item() - statistics.fmean(others) if others else 0.0
        torch.testing.assert_close(advantage[p, i].item(), expected)
    assert (advantage[~mask] == 0).all()


def test_mean_weights_are_the_gradient_of_the_single_sample_bound():
    values, mask = random_group()
    values.requires_grad_()
    (exact,) = torch.autograd.grad(single_sample_bound(values, mask).sum(), values)
    torch.testing.assert_close(mean_weights(values, mask), exact)


def test_the_multi_sample_advantage_never_falls_below_log_of_m_minus_1_over_m():
    """One sample far worse than three equal ones: log(3 e^l / 4) - log(3 e^l / 3) = log(3/4). Far better: unbounded."""
    mask = torch.ones(2, 4, dtype=torch.bool)
    values = torch.tensor([[-1e4, -5.0, -5.0, -5.0], [-5.0, -1e4, -1e4, -1e4]], dtype=torch.float64)
    advantage = multi_sample_advantage(values, mask)
    torch.testing.assert_close(advantage[0, 0].item(), math.log(3 / 4))
    torch.testing.assert_close(advantage[1, 0].item(), 1e4 - 5 - math.log(4))
    torch.testing.assert_close(advantage[1, 1:], torch.full((3,), math.log(3 / 4), dtype=torch.float64))


@pytest.mark.parametrize("function", [multi_sample_advantage, leave_one_out_advantage])
@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_adding_a_constant_to_every_log_prob_changes_no_advantage(function, shift):
    values, mask = random_group()
    torch.testing.assert_close(function(values + shift, mask), function(values, mask), rtol=0, atol=1e-10)


@pytest.mark.parametrize("function", [multi_sample_advantage, leave_one_out_advantage])
@pytest.mark.parametrize("level", [-1e4, -12345.678, -3.3])
@pytest.mark.parametrize("group_size", [2, 3, 7])
def test_equal_samples_have_no_advantage_even_after_scaling(function, level, group_size):
    """What rounding leaves must not be blown up by the division through its own std."""
    mask = torch.ones(3, group_size, dtype=torch.bool)
    advantage = function(torch.full((3, group_size), level, dtype=torch.float64), mask)
    std = std_from_moments(moments(advantage, mask))
    assert scale_and_clip(advantage, std, 1.0).abs().max() < 1e-5


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
def test_what_stands_at_an_invalid_position_changes_no_advantage(function, junk):
    values, mask = random_group()
    torch.testing.assert_close(function(torch.where(mask, values, junk), mask), function(values, mask), rtol=0, atol=0)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_advantage_is_detached_and_keeps_the_dtype(function):
    values, mask = random_group()
    advantage = function(values.float().requires_grad_(), mask)
    assert not advantage.requires_grad and advantage.dtype == torch.float32


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_mask_of_another_shape_or_kind_is_refused(function):
    for mask in (torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 3)):
        with pytest.raises(ValueError, match="bool mask of the same shape"):
            function(torch.zeros(2, 3), mask)


def test_a_bool_reward_is_a_reward_of_zero_and_one():
    reward = torch.tensor([[True, False, False]])
    advantage = leave_one_out_advantage(reward, torch.ones_like(reward))
    torch.testing.assert_close(advantage, torch.tensor([[1.0, -0.5, -0.5]], dtype=torch.float64))


def test_moments_of_any_split_add_up_to_the_population_std():
    values, mask = random_group()
    total = sum(moments(values[part], mask[part]) for part in (slice(0, 1), slice(1, 5), slice(5, 6)))
    expected = statistics.pstdev(values[mask].tolist())
    torch.testing.assert_close(std_from_moments(total).item(), expected)


def test_the_group_std_is_the_population_std_of_the_groups_own_samples():
    values, mask = random_group()
    std = group_std(torch.where(mask, values, math.nan), mask)
    for p in range(len(values)):
        own = values[p][mask[p]].tolist()
        torch.testing.assert_close(std[p, 0].item(), statistics.pstdev(own) if own else 0.0)


def test_nothing_counted_has_a_std_of_zero():
    assert std_from_moments(moments(torch.full((2, 2), math.nan), torch.zeros(2, 2, dtype=torch.bool))) == 0


def test_scaling_clips_and_does_not_subtract_the_mean():
    advantage = torch.tensor([[3.0, 1.0, -0.5, -9.0]], dtype=torch.float64)
    expected = torch.tensor([[1.0, 0.5, -0.25, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(scale_and_clip(advantage, 2.0, 1.0), expected, rtol=0, atol=1e-6)
