"""Every reward of the family: exact gradients by enumeration, closed forms, invariances, what it never reads."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nemo_jepo.config.objectives import OBJECTIVES
from nemo_jepo.objective import sample_weights
from nemo_jepo.objective.likelihood import (
    AnswerLikelihood,
    geometric_mean,
    mean_logprob,
    perplexity_gain,
    probability,
    probability_gain,
    reflective_logprob,
    sum_logprob,
    uncertain_probability,
)
from nemo_jepo.objective.registry import LIKELIHOOD_TERMS
from tests.unit.objective.batches import batch, map_tensors, rule_of
from tests.unit.objective.tabular import (
    CHAINS,
    MARKER,
    PLAIN,
    TabularPolicy,
    expected_update,
    marked_samples,
    reference_answer_samples,
    scores_of,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
NAN = math.nan
TABLES = ("token_logprobs", "initial_token_logprobs", "no_chain_logprobs", "initial_no_chain_logprobs")


@pytest.fixture
def policy() -> TabularPolicy:
    return TabularPolicy(seed=7)


def expectation(policy: TabularPolicy, value: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
    """sum_c pi(c) value(c), differentiable."""
    return torch.stack([policy.chain_logprobs(c).sum().exp() * value(c) for c in CHAINS]).sum()


# ---- exact gradients -------------------------------------------------------------------------------------------------

REWARDS: dict[str, Callable[[TabularPolicy, tuple[int, ...]], Tensor]] = {
    "avg_logprob": lambda policy, chain: policy.answer_logprobs(chain).mean(),
    "verifree": lambda policy, chain: policy.answer_logprobs(chain).sum().exp(),
    "gm": lambda policy, chain: policy.answer_logprobs(chain).mean().exp(),
}
"""R(c), differentiable, as the paper writes it; every answer here has T = 2 tokens."""


@pytest.mark.parametrize("group_size", [2, 3])
@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_of_one_chain_follows_the_exact_gradient_of_its_expectation(policy, name, group_size):
    """grad E_c[R(c)] whole: the chain's part and the answer's."""
    exact = policy.gradient(expectation(policy, lambda chain: REWARDS[name](policy, chain)))
    rule = replace(PLAIN, name=name)
    torch.testing.assert_close(expected_update(rule, reference_answer_samples(policy), group_size), exact, **CLOSE)


def mean_probability(policy: TabularPolicy, chain: tuple[int, ...]) -> Tensor:
    return policy.answer_logprobs(chain).exp().mean()


def test_rlpr_follows_the_clipped_gain_in_the_chain_and_the_mean_probability_in_the_answer(policy):
    """E_c[ clip(mean p - mean p0, 0, 1) ] with the reward held fixed, and beta_sup E_c[ grad mean p ]."""
    without = mean_probability(policy, (MARKER,)).detach()
    gain = [(mean_probability(policy, chain) - without).clamp(0, 1).detach() for chain in CHAINS]
    assert min(gain) == 0 < max(gain)
    of_chain = policy.gradient(expectation(policy, lambda chain: gain[CHAINS.index(chain)]))
    fixed = [policy.chain_logprobs(chain).sum().exp().detach() for chain in CHAINS]
    of_answer = policy.gradient(
        torch.stack([p * mean_probability(policy, chain) for p, chain in zip(fixed, CHAINS, strict=True)]).sum()
    )
    for beta_sup in (0.0, 0.5):
        rule = replace(PLAIN, name="rlpr", no_chain="current", beta_sup=beta_sup)
        update = expected_update(rule, reference_answer_samples(policy), 2)
        torch.testing.assert_close(update, of_chain + beta_sup * of_answer, **CLOSE)


def test_nrt_follows_the_clipped_gain_in_the_chain_and_the_weighted_probability_in_the_answer(policy):
    """v = log p0 / sum log p0 held fixed; E_c[ max(0, sum v p - sum v p0) ], and E_c[ grad sum v p ]."""
    log_without = policy.answer_logprobs((MARKER,)).detach()
    importance = log_without / log_without.sum()

    def weighted(chain: tuple[int, ...]) -> Tensor:
        return (importance * policy.answer_logprobs(chain).exp()).sum()

    without = (importance * log_without.exp()).sum()
    gain = [(weighted(chain) - without).clamp(min=0).detach() for chain in CHAINS]
    assert min(gain) == 0 < max(gain)
    of_chain = policy.gradient(expectation(policy, lambda chain: gain[CHAINS.index(chain)]))
    fixed = [policy.chain_logprobs(chain).sum().exp().detach() for chain in CHAINS]
    of_answer = policy.gradient(torch.stack([p * weighted(c) for p, c in zip(fixed, CHAINS, strict=True)]).sum())
    update = expected_update(replace(PLAIN, name="nrt", no_chain="current"), reference_answer_samples(policy), 2)
    torch.testing.assert_close(update, of_chain + of_answer, **CLOSE)


@pytest.mark.parametrize("name", ["rlpr", "nrt"])
def test_with_no_chain_initial_the_comparison_is_with_the_frozen_policy(policy, name):
    """Another policy's l0 changes the update as it would in the policy's own place."""
    initial = TabularPolicy(seed=11)
    samples = reference_answer_samples(policy)
    by_initial = expected_update(replace(PLAIN, name=name, no_chain="initial"), samples, 2, initial)
    for sample in samples:
        sample.no_chain_logprobs = initial.answer_logprobs((MARKER,)).detach()
    torch.testing.assert_close(
        by_initial, expected_update(replace(PLAIN, name=name, no_chain="current"), samples, 2), **CLOSE
    )
    own = expected_update(replace(PLAIN, name=name, no_chain="current"), reference_answer_samples(policy), 2)
    assert (by_initial - own).abs().max() > 1e-3


def test_r3_follows_the_exact_gradient_of_one_group_with_its_weights_held_fixed(policy):
    """Two chains drawn twice over: E over the pair of sum_i (R_i - R_j) grad log pi(c_i) / 2 + 1/2 sum_i sum_t w_t grad
    l_it, w from the two."""
    samples = reference_answer_samples(policy)
    expected = torch.zeros_like(policy.parameters)
    for one in samples:
        for other in samples:
            tokens = torch.stack([one.answer_logprobs, other.answer_logprobs])
            spread = tokens.std(0, correction=0)
            weight = spread / spread.sum() if spread.sum() > 0 else torch.zeros(2)
            reward = (weight * tokens).sum(-1)
            chance = one.probability * other.probability
            for i, sample in enumerate((one, other)):
                chain = len(sample.chain)
                expected = expected + chance * (
                    (reward[i] - reward[1 - i]) / 2 * sample.gradients[:chain].sum(0)
                    + (weight.unsqueeze(-1) * sample.gradients[chain:]).sum(0) / 2
                )
    update = expected_update(replace(PLAIN, name="r3"), samples, 2)
    torch.testing.assert_close(update, expected.detach(), **CLOSE)


def test_vr_cli_follows_the_steps_of_the_initial_policys_gain_and_nothing_else(policy):
    """E_c[R] with R by the frozen policy: no gradient through the answer, none through R."""
    initial = TabularPolicy(seed=4)

    def reward(chain: tuple[int, ...]) -> float:
        perplexity = math.exp(-initial.answer_logprobs(chain).detach().mean())
        without = math.exp(-initial.answer_logprobs((MARKER,)).detach().mean())
        saved = 100 * (without - perplexity) / without
        return 0.0 if saved < 0.05 else 0.5 if saved < 1 else 0.9 if saved < 2 else 1.0

    rewards = [torch.tensor(reward(chain), dtype=torch.float64) for chain in CHAINS]
    assert len({float(r) for r in rewards}) > 1
    exact = policy.gradient(expectation(policy, lambda chain: rewards[CHAINS.index(chain)]))
    rule = replace(PLAIN, name="vr_cli", no_chain="initial", beta_sup=0.0)
    torch.testing.assert_close(expected_update(rule, reference_answer_samples(policy), 2, initial), exact, **CLOSE)


# ---- closed forms ----------------------------------------------------------------------------------------------------


def answer(tokens: list[list[float]], no_chain: list[float] | None = None, length: int | None = None):
    """One prompt's answer behind its chains, token by token, nats."""
    table = torch.tensor([tokens], dtype=torch.float64)
    count = length or table.shape[-1]
    return AnswerLikelihood(
        logprob=table[..., :count].sum(-1),
        length=torch.full(table.shape[:2], count),
        valid_mask=torch.ones(table.shape[:2], dtype=torch.bool),
        token_logprobs=table,
        no_chain_logprobs=None if no_chain is None else torch.tensor([no_chain], dtype=torch.float64),
    )


HALF, QUARTER = math.log(0.5), math.log(0.25)


@pytest.mark.parametrize(
    ("reward", "value", "slope"),
    [
        (sum_logprob, 3 * HALF, 1.0),
        (mean_logprob, 1.5 * HALF, 0.5),
        (probability, 0.125, 0.125),
        (geometric_mean, 0.125**0.5, 0.125**0.5 / 2),
        (probability_gain, 0.375 - 0.25, [0.25, 0.125]),
        (uncertain_probability, 0.375 - 0.25, [0.25, 0.125]),
    ],
)
def test_rewards_of_an_answer_of_two_tokens(reward, value, slope):
    """p = 1/2, 1/4 behind the chain and 1/4, 1/4 without one; a third place that is no token."""
    found = reward(answer([[HALF, QUARTER, NAN]], [QUARTER, QUARTER, NAN], length=2))
    assert found.value.item() == pytest.approx(value)
    wanted = torch.tensor(slope, dtype=torch.float64)
    torch.testing.assert_close(found.slope.flatten()[: wanted.numel()], wanted.flatten())
    assert found.slope.flatten()[2:].abs().sum() == 0


@pytest.mark.parametrize(
    "reward", [sum_logprob, mean_logprob, probability, geometric_mean, probability_gain, uncertain_probability]
)
def test_the_slope_of_a_reward_is_its_derivative(reward):
    """By autograd, where no clip is met; r3's and nrt's weights of tokens are no function of l here."""
    given = answer([[-1.0, -0.5, -0.2], [-0.6, -0.4, -1.1]], [-2.0, -3.0, -2.5])
    tokens = given.token_logprobs.clone().requires_grad_()
    value, slope = reward(replace(given, token_logprobs=tokens, logprob=tokens.sum(-1)))
    (exact,) = torch.autograd.grad(value.sum(), tokens)
    assert (value > 0).all() or reward in (sum_logprob, mean_logprob)
    torch.testing.assert_close(slope.detach().unsqueeze(-1).expand_as(exact) if slope.ndim == 2 else slope, exact)


def test_rlpr_and_nrt_give_nothing_for_a_chain_that_does_not_help():
    worse = answer([[QUARTER, QUARTER], [HALF, HALF]], [HALF, QUARTER])
    assert probability_gain(worse).value.tolist() == [[0.0, pytest.approx(0.125)]]
    assert uncertain_probability(worse).value[0, 0] == 0
    assert (uncertain_probability(worse).slope > 0).all()


def test_nrt_weighs_tokens_by_their_surprise_without_a_chain():
    """-log p0 = log 2 and log 4: v = 1/3 and 2/3. A certain token weighs nothing."""
    slope = uncertain_probability(answer([[0.0, 0.0, 0.0]], [HALF, QUARTER, 0.0])).slope
    torch.testing.assert_close(slope[0, 0], torch.tensor([1 / 3, 2 / 3, 0.0], dtype=torch.float64))
    assert uncertain_probability(answer([[0.0, 0.0]], [0.0, 0.0])).slope.abs().sum() == 0


def test_r3_weighs_tokens_by_their_spread_within_the_group():
    """Token 1 is -1 everywhere, token 2 -1 and -3 (std 1), token 3 -2 and -8 (std 3): w = 0, 1/4, 3/4."""
    found = reflective_logprob(answer([[-1.0, -1.0, -2.0], [-1.0, -3.0, -8.0]]))
    torch.testing.assert_close(found.slope[0, 0], torch.tensor([0.0, 0.25, 0.75], dtype=torch.float64))
    torch.testing.assert_close(found.value, torch.tensor([[-1.75, -6.75]], dtype=torch.float64))
    assert reflective_logprob(answer([[-1.0], [-1.0]])).value.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(("saved", "reward"), [(-1.0, 0), (0.04, 0), (0.06, 0.5), (0.99, 0.5), (1.01, 0.9), (2.01, 1)])
def test_vr_cli_has_four_steps_of_the_share_of_perplexity_saved(saved, reward):
    """PPL = PPL0 (1 - saved/100), over 4 tokens."""
    behind = (math.log(0.3) - math.log1p(-saved / 100)) * torch.ones(4)
    found = perplexity_gain(answer([behind.tolist()], [math.log(0.3)] * 4))
    assert found.value.item() == reward


# ---- what all of them share ------------------------------------------------------------------------------------------


NAMES = list(LIKELIHOOD_TERMS)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_valid_is_never_read(name):
    """NaN behind every mask: finite weights, and the same as with other numbers there."""
    scores = batch(level=-6.0)
    spoiled = replace(scores, answer_logprob=torch.where(scores.valid_mask, scores.answer_logprob, NAN))
    other = map_tensors(scores, lambda n, v: torch.nan_to_num(v, nan=-5.0) if "logprobs" in n else v)
    found, again = (sample_weights(rule_of(name, normalize=True), one) for one in (spoiled, other))
    for field in ("policy_weight", "answer_weight", "answer_slope"):
        left, right = getattr(found, field), getattr(again, field)
        if left is None:
            assert right is None
            continue
        assert torch.isfinite(left).all()
        torch.testing.assert_close(left, right, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name, kind in OBJECTIVES.items() if kind.reads_tokens])
def test_an_objective_without_the_tables_that_it_reads_is_refused(name):
    scores = replace(batch(), **dict.fromkeys(TABLES))
    with pytest.raises(ValueError, match=f"objective {name} reads the answer's log-probs"):
        sample_weights(rule_of(name), scores)


@pytest.mark.parametrize("name", ["gm", "rlpr", "r3", "nrt", "vr_cli", "avg_logprob"])
def test_group_std_makes_the_leave_one_out_advantage_that_of_grpo(name):
    """clip aside: (R - mean R) / std R over the group, whatever m/(m-1) the leave-one-out mean brings."""
    scores = batch(level=-6.0)
    rule = rule_of(name, normalize=True, std_scope="group", clip=1e9)
    found = sample_weights(rule, scores).advantage
    raw = sample_weights(rule_of(name), scores).advantage
    for group in range(len(raw)):
        values = raw[group][scores.valid_mask[group]]
        if len(values) > 1 and values.std(correction=0) > 1e-3:
            wanted = (values - values.mean()) / values.std(correction=0)
            torch.testing.assert_close(found[group][scores.valid_mask[group]], wanted, rtol=1e-4, atol=1e-4)


def test_the_baseline_of_r3_reaches_no_advantage():
    """sum_t w_t l0_t, which the paper subtracts, is one number a prompt."""
    scores = batch(level=-6.0)
    weights = reflective_logprob(
        AnswerLikelihood(
            logprob=scores.answer_logprob,
            length=scores.answer_length,
            valid_mask=scores.valid_mask,
            token_logprobs=scores.token_logprobs,
        )
    )
    baseline = (weights.slope * torch.nan_to_num(scores.no_chain_logprobs).unsqueeze(1)).sum(-1)
    terms = LIKELIHOOD_TERMS["r3"]
    value = torch.where(scores.valid_mask, weights.value, 0.0)
    less = torch.where(scores.valid_mask, weights.value - baseline, 0.0)
    torch.testing.assert_close(terms.advantage(less, scores.valid_mask), terms.advantage(value, scores.valid_mask))
    assert baseline[scores.valid_mask].abs().max() > 0.1


def test_chains_without_a_marker_have_no_part_in_the_token_tables(policy):
    """Invalid samples: NaN tokens, no weight, and no say in r3's spread."""
    samples = marked_samples(policy)
    valid, other, invalid = samples[0], samples[1], samples[3]
    with_it = sample_weights(rule_of("r3"), scores_of([[valid, other, invalid]]))
    without = sample_weights(rule_of("r3"), scores_of([[valid, other]]))
    torch.testing.assert_close(with_it.answer_slope[:, :2], without.answer_slope)
    torch.testing.assert_close(with_it.advantage[:, :2], without.advantage)
    assert with_it.answer_slope[0, 2].abs().sum() == 0
