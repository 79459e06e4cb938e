"""Credits of hand-made batches: closed forms, edges, refusals."""

import math
from dataclasses import fields, replace

import pytest
import torch

from nemo_jepo.objective import GroupScores, sample_credits, uses_verifiable_reward
from nemo_jepo.objective.advantages import leave_one_out_advantage, multi_sample_advantage
from nemo_jepo.objective.bounds import bound_weights
from tests.unit.objective.batches import OBJECTIVES, PAPER, batch, credits_equal, map_tensors
from tests.unit.objective.tabular import PLAIN


def test_credits_of_one_prompt_are_those_of_appendix_b2():
    """4 samples, 3 valid, 1 without marker: every factor written out."""
    scores = map_tensors(batch(), lambda n, value: value[:1].clone())
    for mask in (scores.valid_mask, scores.has_marker):
        mask[0, 3] = False
    credits = sample_credits(replace(PAPER, beta_sup=0.5), scores)
    raw = multi_sample_advantage(scores.answer_logprob, scores.valid_mask)
    std = raw[0, :3].std(correction=0)
    format_raw = torch.tensor([10 / 3, 10 / 3, 10 / 3, -10.0], dtype=torch.float64)  # reward less mean of the others
    expected = (raw[0] / std).clamp(-1, 1) / 4 + (format_raw / format_raw.std(correction=0)).clamp(-1, 1) / 4
    torch.testing.assert_close(credits.credit[0], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        credits.answer_weight, 0.5 * bound_weights(scores.answer_logprob, scores.valid_mask), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(credits.kl_weight, torch.full((1, 4), 1e-3 / 4, dtype=torch.float64))


def test_denominators_count_prompts_with_a_valid_and_with_an_arrived_sample():
    """Prompt 2 has no valid sample and prompt 3 none that arrived: 5 and 6 of 7."""
    scores = batch()
    assert scores.valid_mask.any(-1).sum() == 5 and scores.arrived_mask.any(-1).sum() == 6
    credits = sample_credits(PAPER, scores)
    torch.testing.assert_close(credits.answer_weight.sum().item(), 1.0)
    torch.testing.assert_close(credits.answer_weight[0].sum().item(), 1 / 5)
    torch.testing.assert_close(credits.kl_weight.sum().item(), 1e-3)
    torch.testing.assert_close(credits.kl_weight[0], torch.full((4,), 1e-3 / 4 / 6, dtype=torch.float64))


def test_the_rl_credit_is_averaged_over_samples_and_over_prompts_with_a_valid_sample():
    """Prompt 0: 4 samples arrived, and 5 prompts have a valid one."""
    credits = sample_credits(replace(PAPER, format_penalty=0.0), batch())
    torch.testing.assert_close(credits.credit[0], credits.advantage[0] / 4 / 5)
    assert credits.credit[0].abs().max() > 1e-3


def test_std_scope_group_scales_each_prompt_by_its_own_std():
    """Log-probs a hundred times as far apart: the same advantages by group, a hundred times as large by batch."""
    scores = map_tensors(batch(), lambda n, value: value[:2].clone())
    for mask in (scores.arrived_mask, scores.valid_mask, scores.has_marker):
        mask[:] = True
    scores.answer_logprob[0] = torch.tensor([-1.0, -1.2, -1.4, -1.6])
    scores.answer_logprob[1] = scores.answer_logprob[0] * 100
    rule = replace(PAPER, name="jepo_single", clip=1e3)
    grouped = sample_credits(replace(rule, std_scope="group"), scores).advantage
    torch.testing.assert_close(grouped[0], grouped[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grouped.std(-1, correction=0), torch.ones(2, dtype=torch.float64), rtol=1e-5, atol=0)
    pooled = sample_credits(rule, scores).advantage
    torch.testing.assert_close(pooled[1], pooled[0] * 100)


def test_k1_reward_pulls_every_arrived_sample_of_a_prompt_with_a_valid_one():
    """All l_i equal, log-ratios 1, 2, 3, 6 (leave-one-out -8/3, -4/3, 0, 4): also the unmarked sample is credited."""
    scores = map_tensors(batch(), lambda n, value: value[:1].clone())
    scores.answer_logprob[0], scores.chain_log_ratio[0] = -3.0, torch.tensor([1.0, 2.0, 3.0, 6.0])
    scores.valid_mask[0, 3] = scores.has_marker[0, 3] = False
    rule = replace(PLAIN, name="jepo_single", kl_beta=0.1, kl_estimator="k1_reward")
    credits = sample_credits(rule, scores)
    expected = -0.1 * torch.tensor([[-8 / 3, -4 / 3, 0.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(credits.advantage, expected)
    torch.testing.assert_close(credits.credit, expected / 4)
    assert (credits.kl_weight == 0).all()
    scores.valid_mask[0] = False
    assert (sample_credits(rule, scores).credit == 0).all()


def test_jepo_and_rloo_prompts_of_jepo_rl_get_their_own_objective_and_std():
    """Prompts with a positive reward train as in rloo, scaled by the rewards' std alone; the others as in jepo."""
    scores, rule = batch(), replace(PAPER, name="jepo_rl", format_penalty=0.0)
    mixed = sample_credits(rule, scores)
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
    expected = {"rloo": [True] * 4, "jepo_rl": [True, False, False, True]}
    for name in OBJECTIVES:
        assert uses_verifiable_reward(name, reward).tolist() == expected.get(name, [False] * 4)


def test_length_normalization_divides_log_probs_by_their_number():
    """Equal to plain credits of l_i / |a_i|, over |c_i| and |a_i| tokens."""
    scores, rule = batch(), replace(PAPER, length_normalization="tokens")
    per_token = replace(scores, answer_logprob=scores.answer_logprob / scores.answer_length)
    plain, normalised = sample_credits(PAPER, per_token), sample_credits(rule, scores)
    torch.testing.assert_close(normalised.credit, plain.credit / scores.chain_length)
    torch.testing.assert_close(normalised.answer_weight, plain.answer_weight / scores.answer_length)
    torch.testing.assert_close(normalised.kl_weight, plain.kl_weight)


def test_length_normalization_counts_own_answers_among_the_sampled_tokens():
    scores = batch()
    plain = sample_credits(replace(PAPER, name="rloo"), scores)
    normalised = sample_credits(replace(PAPER, name="rloo", length_normalization="tokens"), scores)
    tokens = scores.chain_length + scores.answer_length * scores.valid_mask
    torch.testing.assert_close(normalised.credit, plain.credit / tokens)


def test_rl_reduction_sum_drops_one_over_n_from_the_rl_term_alone():
    rule = replace(PAPER, format_penalty=0.0)
    mean, total = sample_credits(rule, batch()), sample_credits(replace(rule, rl_reduction="sum"), batch())
    num_arrived = batch().arrived_mask.sum(-1, keepdim=True)
    torch.testing.assert_close(total.credit, mean.credit * num_arrived)
    torch.testing.assert_close(total.answer_weight, mean.answer_weight)
    format_only = replace(PAPER, name="vr_cli")
    same = map_tensors(batch(), lambda n, value: torch.zeros_like(value) if n == "answer_logprob" else value)
    credits_equal(sample_credits(format_only, same), sample_credits(replace(format_only, rl_reduction="sum"), same))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("level", [-20.0, -1e4])
def test_a_batch_without_a_valid_sample_has_the_format_loss_and_kl_alone(name, level):
    nothing = map_tensors(batch(level=level), lambda n, value: value & False if n == "valid_mask" else value)
    credits = sample_credits(replace(PAPER, name=name, format_penalty=0.0), nothing)
    if name != "sft":
        assert (credits.credit == 0).all() and (credits.answer_weight == 0).all()
        torch.testing.assert_close(credits.kl_weight.sum().item(), 1e-3)
    assert (sample_credits(replace(PAPER, name=name), nothing).credit != 0).any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_in_which_nothing_arrived_has_no_update(name):
    lost = map_tensors(batch(), lambda n, value: value & False if value.dtype == torch.bool else value)
    credits = sample_credits(replace(PAPER, name=name), lost)
    for weight in (credits.credit, credits.answer_weight, credits.kl_weight):
        assert (weight == 0).all()


@pytest.mark.parametrize("name", ["jepo", "jepo_single", "vr_cli", "prob_pg", "rloo", "jepo_rl"])
def test_samples_that_are_all_equal_earn_no_credit(name):
    equal = map_tensors(batch(), lambda n, v: torch.full_like(v, -1e4) if n == "answer_logprob" else v)
    equal = replace(equal, verifiable_reward=equal.valid_mask.double())
    assert sample_credits(replace(PAPER, name=name, format_penalty=0.0), equal).credit.abs().max() < 1e-5


def test_one_dominant_sample_takes_the_weight_and_the_credit():
    scores = map_tensors(batch(), lambda n, value: value[:1].clone())
    scores.answer_logprob[0] = torch.tensor([-1e4, -1e4, -3.0, -1e4])
    credits = sample_credits(replace(PAPER, format_penalty=0.0), scores)
    torch.testing.assert_close(credits.answer_weight[0], torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64))
    assert credits.advantage[0, 2] == 1.0
    assert (credits.advantage[0, [0, 1, 3]].abs() < 1e-3).all()


@pytest.mark.parametrize("name", ["jepo", "jepo_single", "vr_cli", "prob_pg", "jepo_rl"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_valid_sample_without_a_finite_log_prob_is_refused(name, value):
    scores = batch()
    scores.answer_logprob[0, 2] = value
    scores.verifiable_reward[0] = 0.0
    with pytest.raises(ValueError, match="valid sample 2 of group 0"):
        sample_credits(replace(PAPER, name=name), scores)


@pytest.mark.parametrize("name", ["rloo", "jepo_rl"])
def test_a_verifiable_objective_without_a_reward_is_refused(name):
    with pytest.raises(ValueError, match="needs verifiable_reward"):
        sample_credits(replace(PAPER, name=name), replace(batch(), verifiable_reward=None))


@pytest.mark.parametrize("field", [f.name for f in fields(GroupScores) if f.name != "chain_k3"])
def test_tensors_of_different_shapes_are_refused(field):
    scores = batch()
    for wrong in (getattr(scores, field)[:, :3], getattr(scores, field)[0]):
        with pytest.raises(ValueError, match="every tensor must be"):
            replace(scores, **{field: wrong})


@pytest.mark.parametrize(
    "setting",
    [
        {"name": "jepoo"},
        {"rl_reduction": "max"},
        {"length_normalization": "sqrt"},
        {"importance_sampling": "token"},
        {"std_scope": "rank"},
        {"kl_estimator": "k4"},
    ],
)
def test_a_rule_with_an_unknown_word_is_refused(setting):
    (key,) = setting
    with pytest.raises(ValueError, match=f"{key}=.*must be one of"):
        replace(PLAIN, **setting)
