"""The whole update, from scores to token weights, against exact gradients of what it claims to maximise.

Nothing is sampled except where a test says so: the chains, the answers and the groups are enumerated. Token weights are
float32, hence the tolerance of 1e-6 beside float64 oracles.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nemo_jepo.objective import SequenceLogprobs, sample_weights
from nemo_jepo.objective.update import sequence_weights
from tests.unit.objective.tabular import (
    CHAINS,
    PLAIN,
    REFERENCE_ANSWER,
    Sample,
    TabularPolicy,
    all_groups,
    batch_update,
    expected_update,
    marked_samples,
    own_answer_samples,
    reference_answer_samples,
    scores_of,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
EQ7 = replace(PLAIN, rl_reduction="sum")


@pytest.fixture
def policy() -> TabularPolicy:
    return TabularPolicy(seed=7)


def exact_multi_sample_bound(policy: TabularPolicy, group_size: int) -> Tensor:
    """L_n = sum over groups of prod_i pi(c_i) * (logsumexp_i l_i - log n)."""
    total = torch.zeros((), dtype=torch.float64)
    for group in itertools.product(CHAINS, repeat=group_size):
        probability = torch.stack([policy.chain_logprobs(chain).sum() for chain in group]).sum().exp()
        answer_logprob = torch.stack([policy.answer_logprob(chain) for chain in group])
        total = total + probability * (torch.logsumexp(answer_logprob, 0) - math.log(group_size))
    return total


def expectation(policy: TabularPolicy, value) -> Tensor:
    """sum_c pi(c) value(c), differentiable."""
    return torch.stack([policy.chain_logprobs(c).sum().exp() * value(c) for c in CHAINS]).sum()


def exact_probability(policy: TabularPolicy) -> Tensor:
    """pi(a*|x) = E_c[pi(a*|x, c)]."""
    return expectation(policy, lambda chain: policy.answer_logprob(chain).exp())


def exact_kl(policy: TabularPolicy, reference: TabularPolicy) -> Tensor:
    """KL(pi(c), pi_ref(c)) over whole chains."""
    return expectation(policy, lambda c: policy.chain_logprobs(c).sum() - reference.chain_logprobs(c).sum().detach())


@pytest.mark.parametrize("group_size", [2, 3])
def test_jepo_follows_the_exact_gradient_of_the_multi_sample_bound(policy, group_size):
    """Eq. 7: both terms together are grad L_n."""
    exact = policy.gradient(exact_multi_sample_bound(policy, group_size))
    torch.testing.assert_close(expected_update(EQ7, reference_answer_samples(policy), group_size), exact, **CLOSE)


def test_jepo_of_one_sample_has_the_supervised_term_alone(policy):
    """m = 1: no sibling, so A = 0 and E[grad l] remains."""
    fixed = [policy.chain_logprobs(chain).sum().exp().detach() for chain in CHAINS]
    supervised = torch.stack([p * policy.answer_logprob(c) for p, c in zip(fixed, CHAINS, strict=True)]).sum()
    update = expected_update(EQ7, reference_answer_samples(policy), group_size=1)
    torch.testing.assert_close(update, policy.gradient(supervised), **CLOSE)


@pytest.mark.parametrize("group_size", [2, 3])
def test_jepo_single_follows_the_exact_gradient_of_the_single_sample_bound(policy, group_size):
    """Eq. 5 has its own 1/n: rl_reduction=mean."""
    rule = replace(PLAIN, name="jepo_single")
    exact = policy.gradient(expectation(policy, policy.answer_logprob))
    torch.testing.assert_close(expected_update(rule, reference_answer_samples(policy), group_size), exact, **CLOSE)


def test_jepo_single_without_the_supervised_term_follows_the_reinforce_part_alone(policy):
    """grad of E_c[l] with l held fixed."""
    exact = policy.gradient(expectation(policy, lambda chain: policy.answer_logprob(chain).detach()))
    rule = replace(PLAIN, name="jepo_single", beta_sup=0.0)
    torch.testing.assert_close(expected_update(rule, reference_answer_samples(policy), 2), exact, **CLOSE)


def test_sft_on_sampled_chains_follows_the_answers_log_prob_behind_chains_that_are_held_fixed(policy):
    """E_c[grad l], c ~ pi held fixed; the chains themselves are neither reinforced nor discouraged."""
    samples = reference_answer_samples(policy)
    exact = sum(s.probability * s.gradients[len(s.chain) :].sum(0) for s in samples)
    found = expected_update(replace(PLAIN, name="sft_sampled_chain"), samples, 2)
    torch.testing.assert_close(found, exact, **CLOSE)


def test_rloo_follows_the_exact_gradient_of_the_accuracy(policy):
    """The verifier says 1 for a* alone, so the expected reward is pi(a*|x); a is sampled and carries the gradient."""
    exact = policy.gradient(exact_probability(policy))
    update = expected_update(replace(PLAIN, name="rloo"), own_answer_samples(policy), 2)
    torch.testing.assert_close(update, exact, **CLOSE)


def test_jepo_single_and_rloo_differ(policy):
    """The oracles above are not one number under two names."""
    log_likelihood = policy.gradient(expectation(policy, policy.answer_logprob))
    assert (log_likelihood - policy.gradient(exact_probability(policy))).abs().max() > 0.05


def test_monte_carlo_converges_to_the_exact_gradient(policy):
    """20000 sampled groups of 3: every coordinate within 5 standard errors, and those are small beside the gradient."""
    probability, updates = all_groups(EQ7, reference_answer_samples(policy), 3)
    exact = policy.gradient(exact_multi_sample_bound(policy, 3))
    drawn = updates[torch.multinomial(probability, 20000, True, generator=torch.Generator().manual_seed(0))]
    standard_error = drawn.std(0) / math.sqrt(len(drawn))
    assert ((drawn.mean(0) - exact).abs() <= 5 * standard_error + 1e-6).all()
    assert standard_error.norm() < 0.1 * exact.norm()


def test_the_baseline_leaves_the_mean_and_lowers_the_variance(policy):
    """Without it every sample of a group is reinforced with R itself: R sum_i grad log pi(c_i) + grad L_n."""
    samples = reference_answer_samples(policy)
    probability, with_baseline = all_groups(EQ7, samples, 3)
    without_baseline = torch.stack([_update_without_baseline(group) for group in itertools.product(samples, repeat=3)])
    mean = probability @ with_baseline
    torch.testing.assert_close(mean, probability @ without_baseline, **CLOSE)
    variance = [probability @ (u - mean).square().sum(-1) for u in (with_baseline, without_baseline)]
    assert variance[0] < 0.7 * variance[1]


def _update_without_baseline(group: tuple[Sample, ...]) -> Tensor:
    answer_logprob = torch.stack([s.answer_logprob for s in group])
    bound = torch.logsumexp(answer_logprob, 0) - math.log(len(group))
    update = torch.zeros_like(group[0].gradients[0])
    for sample, weight in zip(group, answer_logprob.softmax(0), strict=True):
        chain = len(sample.chain)
        update += bound * sample.gradients[:chain].sum(0) + weight * sample.gradients[chain:].sum(0)
    return update


def test_the_update_of_a_batch_is_the_mean_of_its_prompts_updates(policy):
    """Two prompts, each with every pair of two valid chains and an invalid one, all as likely: E[u] is the mean of both
    E[u_p]. Over prompts with a valid sample alone it is not: one that is left takes the weight of both."""
    valid_and_not = [sample for sample in marked_samples(policy) if sample.chain in ((2,), (0, 2), (0, 0))]
    _, alone = all_groups(PLAIN, valid_and_not, 2)
    groups = list(itertools.product(valid_and_not, repeat=2))
    pairs = list(itertools.product(range(len(groups)), repeat=2))
    found = {}
    for name in ("all", "valid"):
        rule = replace(PLAIN, prompt_mean=name)
        found[name] = torch.stack([batch_update(rule, [groups[i], groups[j]]) for i, j in pairs]).mean(0)
    torch.testing.assert_close(found["all"], alone.mean(0), **CLOSE)
    assert (found["valid"] - alone.mean(0)).abs().max() > 0.01


def kl_update(policy: TabularPolicy, reference: TabularPolicy, rule, group_size: int = 2) -> Tensor:
    """The KL's part of the expected update, for beta = 1."""
    samples = reference_answer_samples(policy)
    with_kl = expected_update(replace(rule, kl_beta=1.0), samples, group_size, reference)
    return with_kl - expected_update(rule, samples, group_size, reference)


@pytest.mark.parametrize("estimator", ["k2_sequence", "k1_reward"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_sequence_estimators_follow_the_exact_gradient_of_the_reverse_kl(policy, estimator, reduction):
    reference = TabularPolicy(seed=8)
    rule = replace(PLAIN, kl_estimator=estimator, rl_reduction=reduction)
    exact = -policy.gradient(exact_kl(policy, reference))
    torch.testing.assert_close(kl_update(policy, reference, rule), exact, **CLOSE)


def per_token_kl(policy: TabularPolicy, reference: TabularPolicy, reverse: bool) -> Tensor:
    """sum_t E_{prefix}[KL of the next token], with the probability of the prefixes held fixed."""

    def divergence(states: slice) -> Tensor:
        policy_logprobs = policy.parameters[states].view(-1, 3).log_softmax(-1)
        reference_logprobs = reference.parameters[states].view(-1, 3).log_softmax(-1).detach()
        first, second = (policy_logprobs, reference_logprobs) if reverse else (reference_logprobs, policy_logprobs)
        return (first.exp() * (first - second)).sum(-1)

    prefix_probability = policy.parameters[:3].softmax(-1)[:2].detach()
    return divergence(slice(0, 3)).sum() + (prefix_probability * divergence(slice(3, 9))).sum()


def test_k2_token_drops_the_effect_of_a_token_on_later_states(policy):
    """Exactly the gradient of the per-token reverse KL with the prefix distribution held fixed; that is not grad KL."""
    reference = TabularPolicy(seed=8)
    update = kl_update(policy, reference, replace(PLAIN, kl_estimator="k2_token"))
    torch.testing.assert_close(update, -policy.gradient(per_token_kl(policy, reference, reverse=True)), **CLOSE)
    assert (update + policy.gradient(exact_kl(policy, reference))).abs().max() > 0.01


def test_k3_token_follows_the_forward_kl_of_each_token(policy):
    reference = TabularPolicy(seed=8)
    update = kl_update(policy, reference, replace(PLAIN, kl_estimator="k3_token"))
    torch.testing.assert_close(update, -policy.gradient(per_token_kl(policy, reference, reverse=False)), **CLOSE)


def test_importance_sampling_recovers_the_policy_gradient_from_another_sampler(policy):
    """Chains drawn by a lagging sampler, one reward per chain: the uncapped sequence ratio restores grad E_pi[r]."""
    sampler = TabularPolicy(seed=9)
    rule = replace(PLAIN, importance_sampling="sequence_truncated", importance_cap=math.inf)
    reward = {chain: float(k) for k, chain in enumerate(CHAINS)}
    update = torch.zeros_like(policy.parameters)
    for sample in reference_answer_samples(policy):
        generation = sampler.chain_logprobs(sample.chain).detach()
        sequence = SequenceLogprobs(
            chain_length=len(sample.chain),
            answer_length=2,
            policy_logprobs=sample.logprobs,
            generation_logprobs=generation,
        )
        weights = sequence_weights(rule, sequence, reward[sample.chain], 0.0, 0.0).double()
        update = update + generation.sum().exp() * (weights @ sample.gradients)
    exact = policy.gradient(expectation(policy, lambda chain: torch.tensor(reward[chain], dtype=torch.float64)))
    torch.testing.assert_close(update.detach(), exact, **CLOSE)


def test_sft_follows_the_exact_gradient_of_the_target_log_prob(policy):
    """Two prompts' targets of 3 and 4 tokens: mean over prompts, or mean over all 7 target tokens."""
    targets = [Sample(policy, CHAINS[0], REFERENCE_ANSWER), Sample(policy, CHAINS[2], REFERENCE_ANSWER)]
    logprob = sum(policy.chain_logprobs(s.chain).sum() + policy.answer_logprob(s.chain) for s in targets)
    exact = policy.gradient(logprob)
    for normalization, count in (("none", 2), ("batch", 7)):
        rule = replace(PLAIN, name="sft", loss_normalization=normalization)
        coefficients = sample_weights(rule, scores_of([[s] for s in targets]))
        update = torch.zeros_like(policy.parameters)
        for i, sample in enumerate(targets):
            sequence = SequenceLogprobs(chain_length=len(sample.chain), answer_length=2)
            entries = (coefficients.policy_weight[i, 0], coefficients.answer_weight[i, 0], coefficients.kl_weight[i, 0])
            update = update + sequence_weights(rule, sequence, *map(float, entries)).double() @ sample.gradients
        torch.testing.assert_close(update.detach(), exact / count, **CLOSE)
