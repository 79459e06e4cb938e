"""Weights of hand-made batches: closed forms, edges, refusals."""

import math
from dataclasses import fields, replace

import pytest
import torch

from nemo_jepo.objective import GroupScores, sample_weights, uses_verifiable_reward
from nemo_jepo.objective.estimators import bound_weights, leave_one_out_advantage, multi_sample_advantage
from nemo_jepo.objective.registry import LIKELIHOOD_TERMS
from tests.unit.objective.batches import ANSWERS, OBJECTIVES, PAPER, SCORING, batch, map_tensors, weights_equal
from tests.unit.objective.tabular import PLAIN


def test_weights_of_one_prompt_are_those_of_appendix_b2():
    """4 samples, 3 valid, 1 without marker: every factor written out."""
    scores = map_tensors(batch(), lambda n, value: value[:1].clone())
    for mask in (scores.valid_mask, scores.has_marker):
        mask[0, 3] = False
    coefficients = sample_weights(replace(PAPER, beta_sup=0.5), scores)
    raw = multi_sample_advantage(scores.answer_logprob, scores.valid_mask)
    std = raw[0, :3].std(correction=0)
    format_raw = torch.tensor([10 / 3, 10 / 3, 10 / 3, -10.0], dtype=torch.float64)  # reward less mean of the others
    expected = (raw[0] / std).clamp(-1, 1) / 4 + (format_raw / format_raw.std(correction=0)).clamp(-1, 1) / 4
    torch.testing.assert_close(coefficients.policy_weight[0], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        coefficients.answer_weight, 0.5 * bound_weights(scores.answer_logprob, scores.valid_mask), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(coefficients.kl_weight, torch.full((1, 4), 1e-3 / 4, dtype=torch.float64))


@pytest.mark.parametrize(("prompt_mean", "count"), [("all", 6), ("valid", 5)])
def test_the_mean_is_over_prompts_that_arrived_or_over_those_with_a_valid_sample(prompt_mean, count):
    """Prompt 2 has no valid sample and prompt 3 none that arrived: 6 and 5 of 7. The KL's mean is over the 6."""
    scores = batch()
    assert scores.valid_mask.any(-1).sum() == 5 and scores.arrived_mask.any(-1).sum() == 6
    coefficients = sample_weights(replace(PAPER, prompt_mean=prompt_mean), scores)
    torch.testing.assert_close(coefficients.answer_weight.sum().item(), 5 / count)
    torch.testing.assert_close(coefficients.answer_weight[0].sum().item(), 1 / count)
    torch.testing.assert_close(coefficients.kl_weight.sum().item(), 1e-3)
    torch.testing.assert_close(coefficients.kl_weight[0], torch.full((4,), 1e-3 / 4 / 6, dtype=torch.float64))


@pytest.mark.parametrize(("prompt_mean", "count"), [("all", 6), ("valid", 5)])
@pytest.mark.parametrize("name", SCORING)
def test_the_rl_weight_is_averaged_over_samples_and_over_prompts(name, prompt_mean, count):
    """1/n of each prompt's own n, in a batch of 6 prompts that arrived, 5 of them with a valid sample."""
    rule = replace(PAPER, name=name, prompt_mean=prompt_mean, format_loss="none")
    coefficients, num_arrived = sample_weights(rule, batch()), batch().arrived_mask.sum(-1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(coefficients.policy_weight, coefficients.advantage / num_arrived / count)
    assert (coefficients.policy_weight.abs().max() > 1e-3) == (name != "sft_sampled_chain")


@pytest.mark.parametrize("name", [name for name, kind in OBJECTIVES.items() if not kind.supervised])
def test_a_lone_prompt_with_a_valid_sample_keeps_the_weight_of_one_prompt(name):
    """1 of 64: 1/64 of what it weighs alone, in all terms; over valid prompts it has 64 times as much."""
    whole = map_tensors(batch(), lambda n, value: value[:1])
    empty = map_tensors(whole, lambda n, v: torch.zeros_like(v) if n in ("valid_mask", "verifiable_reward") else v)
    scores = map_tensors(whole, lambda n, v: torch.cat([v, *[getattr(empty, n)] * 63]))
    rule = replace(PAPER, name=name, format_loss="none")
    alone, among = sample_weights(rule, whole), sample_weights(rule, scores)
    for field in ("policy_weight", "answer_weight"):
        torch.testing.assert_close(getattr(among, field)[:1], getattr(alone, field) / 64)
        assert (getattr(among, field)[1:] == 0).all()
    over_valid = sample_weights(replace(rule, prompt_mean="valid"), scores)
    torch.testing.assert_close(over_valid.policy_weight, 64 * among.policy_weight)
    torch.testing.assert_close(over_valid.answer_weight, 64 * among.answer_weight)


def test_with_invalid_samples_the_rl_term_has_1_over_n_and_the_supervised_term_1_over_m():
    """n = 4, m = 2, l = -3 and -5: Eq. 5 with m for n would have both over 2, so the RL term has m/n of it."""
    scores = map_tensors(batch(), lambda n, value: value[:1].clone())
    scores.valid_mask[0] = torch.tensor([True, True, False, False])
    scores.answer_logprob[0, :2] = torch.tensor([-3.0, -5.0])
    found = sample_weights(replace(PLAIN, name="jepo_single"), scores)
    torch.testing.assert_close(found.policy_weight[0].tolist(), [2 / 4, -2 / 4, 0.0, 0.0])
    torch.testing.assert_close(found.answer_weight[0].tolist(), [1 / 2, 1 / 2, 0.0, 0.0])


def test_std_scope_group_scales_each_prompt_by_its_own_std():
    """Log-probs a hundred times as far apart: the same advantages by group, a hundred times as large by batch."""
    scores = map_tensors(batch(), lambda n, value: value[:2].clone())
    for mask in (scores.arrived_mask, scores.valid_mask, scores.has_marker):
        mask[:] = True
    scores.answer_logprob[0] = torch.tensor([-1.0, -1.2, -1.4, -1.6])
    scores.answer_logprob[1] = scores.answer_logprob[0] * 100
    rule = replace(PAPER, name="jepo_single", clip=1e3)
    grouped = sample_weights(replace(rule, std_scope="group"), scores).advantage
    torch.testing.assert_close(grouped[0], grouped[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grouped.std(-1, correction=0), torch.ones(2, dtype=torch.float64), rtol=1e-5, atol=0)
    pooled = sample_weights(rule, scores).advantage
    torch.testing.assert_close(pooled[1], pooled[0] * 100)


def test_k1_reward_pulls_every_arrived_sample_of_a_prompt_with_a_valid_one():
    """All l_i equal, log-ratios 1, 2, 3, 6 (leave-one-out -8/3, -4/3, 0, 4): also the unmarked sample is reinforced."""
    scores = map_tensors(batch(), lambda n, value: value[:1].clone())
    scores.answer_logprob[0], scores.chain_log_ratio[0] = -3.0, torch.tensor([1.0, 2.0, 3.0, 6.0])
    scores.valid_mask[0, 3] = scores.has_marker[0, 3] = False
    rule = replace(PLAIN, name="jepo_single", kl_beta=0.1, kl_estimator="k1_reward")
    coefficients = sample_weights(rule, scores)
    expected = -0.1 * torch.tensor([[-8 / 3, -4 / 3, 0.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(coefficients.advantage, expected)
    torch.testing.assert_close(coefficients.policy_weight, expected / 4)
    assert (coefficients.kl_weight == 0).all()
    scores.valid_mask[0] = False
    assert (sample_weights(rule, scores).policy_weight == 0).all()


def test_jepo_and_rloo_prompts_of_jepo_rl_get_their_own_objective_and_std():
    """Prompts with a positive reward train as in rloo, scaled by the rewards' std alone; the others as in jepo."""
    scores, rule = batch(), replace(PAPER, name="jepo_rl", format_loss="none")
    mixed = sample_weights(rule, scores)
    solved = uses_verifiable_reward("jepo_rl", scores.verifiable_reward)
    assert 0 < solved.sum() < 5
    for name, prompts, raw in (
        ("rloo", solved, leave_one_out_advantage(scores.verifiable_reward, scores.valid_mask)),
        ("jepo", ~solved, multi_sample_advantage(scores.answer_logprob, scores.valid_mask)),
    ):
        std = raw[prompts][scores.valid_mask[prompts]].std(correction=0)
        torch.testing.assert_close(
            mixed.advantage[prompts], (raw[prompts] / std).clamp(-1, 1), rtol=1e-5, atol=1e-5, msg=name
        )
    assert (mixed.answer_weight[solved] == 0).all()
    assert (mixed.answer_weight[~solved].sum() > 0).all()


def test_verifiable_prompts_are_all_in_rloo_those_with_a_success_in_jepo_rl_and_none_elsewhere():
    reward = torch.tensor([[0.0, 1.0], [0.0, 0.0], [math.nan, 0.0], [math.nan, 1.0]])
    expected = {"rloo": [True] * 4} | dict.fromkeys(("jepo_rl", "dpo"), [True, False, False, True])
    for name in OBJECTIVES:
        assert uses_verifiable_reward(name, reward).tolist() == expected.get(name, [False] * 4)
        by_score = uses_verifiable_reward(name, reward, unverifiable="score").tolist()
        assert by_score == ([True] * 4 if name == "dpo" else expected.get(name, [False] * 4))


@pytest.mark.parametrize("name", ["jepo", "jepo_single"])
def test_reward_normalization_makes_means_of_sums_and_touches_nothing_else(name):
    """Equal to plain coefficients of l_i / |a_i|, whose gradient is that of l_i over |a_i|."""
    scores, rule = batch(), replace(PAPER, name=name)
    per_token = replace(scores, answer_logprob=scores.answer_logprob / scores.answer_length)
    plain = sample_weights(rule, per_token)
    normalised = sample_weights(replace(rule, reward_normalization="answer_tokens"), scores)
    torch.testing.assert_close(normalised.policy_weight, plain.policy_weight)
    torch.testing.assert_close(normalised.answer_weight, plain.answer_weight / scores.answer_length)
    torch.testing.assert_close(normalised.kl_weight, plain.kl_weight)


@pytest.mark.parametrize("name", ["jepo", "rloo"])
@pytest.mark.parametrize("normalization", ["chain", "sequence", "batch"])
def test_loss_normalization_divides_log_probs_by_their_number(name, normalization):
    """chain: own answers, which rloo samples, count among the chain's tokens. The KL stays a sum."""
    scores, rule = batch(), replace(PAPER, name=name)
    plain, found = sample_weights(rule, scores), sample_weights(replace(rule, loss_normalization=normalization), scores)
    both = scores.chain_length + scores.answer_length
    sampled = scores.chain_length + scores.answer_length * (scores.valid_mask if name == "rloo" else 0)
    mean = (both * scores.arrived_mask).sum() / scores.arrived_mask.sum()
    policy, answer = {"chain": (sampled, scores.answer_length), "sequence": (both, both), "batch": (mean, mean)}[
        normalization
    ]
    torch.testing.assert_close(found.policy_weight, plain.policy_weight / policy)
    torch.testing.assert_close(found.answer_weight, plain.answer_weight / answer)
    torch.testing.assert_close(found.kl_weight, plain.kl_weight)
    torch.testing.assert_close(found.end_weight, plain.end_weight)


@pytest.mark.parametrize("normalization", ["none", "chain", "sequence", "batch"])
def test_supervised_targets_are_summed_or_averaged_as_loss_normalization_says(normalization):
    """Two targets of 2 + 1 and 3 + 4 tokens."""
    one = torch.ones(2, 1)
    scores = GroupScores(
        answer_logprob=torch.zeros(2, 1),
        valid_mask=one.bool(),
        arrived_mask=one.bool(),
        has_marker=one.bool(),
        chain_length=torch.tensor([[2], [3]]),
        answer_length=torch.tensor([[1], [4]]),
        chain_log_ratio=torch.zeros(2, 1),
    )
    found = sample_weights(replace(PLAIN, name="sft", loss_normalization=normalization), scores)
    chain, answer = {
        "none": ((1, 1), (1, 1)),
        "chain": ((2, 3), (1, 4)),
        "sequence": ((3, 7), (3, 7)),
        "batch": ((5, 5), (5, 5)),
    }[normalization]
    torch.testing.assert_close(found.policy_weight, 0.5 / torch.tensor([chain], dtype=torch.float64).T)
    torch.testing.assert_close(found.answer_weight, 0.5 / torch.tensor([answer], dtype=torch.float64).T)


def test_rl_reduction_sum_drops_one_over_n_from_the_rl_term_alone():
    rule = replace(PAPER, format_loss="none")
    mean, total = sample_weights(rule, batch()), sample_weights(replace(rule, rl_reduction="sum"), batch())
    num_arrived = batch().arrived_mask.sum(-1, keepdim=True)
    torch.testing.assert_close(total.policy_weight, mean.policy_weight * num_arrived)
    torch.testing.assert_close(total.answer_weight, mean.answer_weight)
    format_only = replace(PAPER, name="jepo_single", beta_sup=0.0)
    same = map_tensors(batch(), lambda n, value: torch.zeros_like(value) if n == "answer_logprob" else value)
    weights_equal(sample_weights(format_only, same), sample_weights(replace(format_only, rl_reduction="sum"), same))


@pytest.mark.parametrize("name", [*SCORING, "sft"])
@pytest.mark.parametrize("level", [-20.0, -1e4])
def test_a_batch_without_a_valid_sample_has_the_format_loss_and_kl_alone(name, level):
    nothing = map_tensors(batch(level=level), lambda n, value: value & False if n == "valid_mask" else value)
    coefficients = sample_weights(replace(PAPER, name=name, format_loss="none"), nothing)
    if name != "sft":
        assert (coefficients.policy_weight == 0).all() and (coefficients.answer_weight == 0).all()
        torch.testing.assert_close(coefficients.kl_weight.sum().item(), 1e-3)
    assert (sample_weights(replace(PAPER, name=name), nothing).policy_weight != 0).any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_in_which_nothing_arrived_has_no_update(name):
    lost = map_tensors(batch(), lambda n, value: value & False if value.dtype == torch.bool else value)
    coefficients = sample_weights(replace(PAPER, name=name), lost)
    for weight in (coefficients.policy_weight, coefficients.answer_weight, coefficients.kl_weight):
        assert (weight == 0).all()


@pytest.mark.parametrize("name", SCORING)
def test_samples_that_are_all_equal_get_no_weight(name):
    equal = map_tensors(batch(), lambda n, v: torch.full_like(v, -1e4) if n in ANSWERS else v)
    equal = replace(equal, verifiable_reward=equal.valid_mask.double())
    assert sample_weights(replace(PAPER, name=name, format_loss="none"), equal).policy_weight.abs().max() < 1e-5


def test_one_dominant_sample_takes_both_weights():
    scores = map_tensors(batch(), lambda n, value: value[:1].clone())
    scores.answer_logprob[0] = torch.tensor([-1e4, -1e4, -3.0, -1e4])
    coefficients = sample_weights(replace(PAPER, format_loss="none"), scores)
    torch.testing.assert_close(coefficients.answer_weight[0], torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64))
    assert coefficients.advantage[0, 2] == 1.0
    assert (coefficients.advantage[0, [0, 1, 3]].abs() < 1e-3).all()


@pytest.mark.parametrize("name", list(LIKELIHOOD_TERMS))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_valid_sample_without_a_finite_log_prob_is_refused(name, value):
    scores = batch()
    for table in ANSWERS:
        getattr(scores, table)[0, 2] = value
    scores.verifiable_reward[0] = 0.0
    with pytest.raises(ValueError, match="valid sample 2 of group 0"):
        sample_weights(replace(PAPER, name=name), scores)


@pytest.mark.parametrize("name", ["rloo", "jepo_rl", "dpo"])
def test_a_verifiable_objective_without_a_reward_is_refused(name):
    with pytest.raises(ValueError, match="needs verifiable_reward"):
        sample_weights(replace(PAPER, name=name), replace(batch(), verifiable_reward=None))


@pytest.mark.parametrize("field", [f.name for f in fields(GroupScores) if f.name != "chain_k3"])
def test_tensors_of_different_shapes_are_refused(field):
    scores = batch()
    table = getattr(scores, field)
    for wrong in (table[:3] if "no_chain" in field else table[:, :3], table[0]):
        with pytest.raises(ValueError, match="every tensor must be"):
            replace(scores, **{field: wrong})


@pytest.mark.parametrize(
    "setting",
    [
        {"name": "jepoo"},
        {"rl_reduction": "max"},
        {"reward_normalization": "sqrt"},
        {"loss_normalization": "tokens"},
        {"no_chain": "frozen"},
        {"format_loss": "penalty"},
        {"importance_sampling": "token"},
        {"std_scope": "rank"},
        {"prompt_mean": "batch"},
        {"kl_estimator": "k4"},
    ],
)
def test_a_rule_with_an_unknown_word_is_refused(setting):
    (key,) = setting
    with pytest.raises(ValueError, match=f"{key}=.*must be one of"):
        replace(PLAIN, **setting)


def test_avg_logprob_divides_each_answer_by_its_own_length():
    """r = -2 and -1 nats a token: advantages -1 and 1; the answer weights are 1/2 of 1/T each, T = 3 and 5."""
    one = torch.ones(1, 2)
    scores = GroupScores(
        answer_logprob=torch.tensor([[-6.0, -5.0]], dtype=torch.float64),
        valid_mask=one.bool(),
        arrived_mask=one.bool(),
        has_marker=one.bool(),
        chain_length=one.long(),
        answer_length=torch.tensor([[3, 5]]),
        chain_log_ratio=torch.zeros(1, 2),
    )
    found = sample_weights(replace(PLAIN, name="avg_logprob", beta_sup=1.0), scores)
    torch.testing.assert_close(found.advantage, torch.tensor([[-1.0, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(found.answer_weight, torch.tensor([[1 / 6, 1 / 10]], dtype=torch.float64))


def test_the_tables_of_objectives_agree():
    """What reads the likelihood has terms; a supervised term is there where the table of kinds says so."""
    assert set(LIKELIHOOD_TERMS) == {name for name in SCORING if OBJECTIVES[name].reads_likelihood}
    for name, terms in LIKELIHOOD_TERMS.items():
        assert (terms.answer_weight is not None) == OBJECTIVES[name].answer_term
