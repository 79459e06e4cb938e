"""Coefficients and weights of hand-made batches, and what must not change them."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace

import pytest
import torch

from nemo_jepo.objective import (
    GroupScores,
    SampleCredits,
    SequenceLogprobs,
    UpdateRule,
    sample_credits,
    token_weights,
    uses_verifiable_reward,
)
from nemo_jepo.objective.advantages import leave_one_out_advantage, multi_sample_advantage
from nemo_jepo.objective.bounds import bound_weights
from tests.objective.tabular import PLAIN

OBJECTIVES = ("jepo", "jepo_single", "vr_cli", "prob_pg", "rloo", "jepo_rl", "sft")
PAPER = replace(PLAIN, normalize=True, format_penalty=10.0, kl_beta=1e-3)
"""App. B.2: scaled, clipped, with format loss and KL."""


def batch(seed: int = 0, num_prompts: int = 7, level: float = -20.0) -> GroupScores:
    """Random groups of 4 with failed, unmarked and misaligned samples.

    Prompt 0 is whole, 1 has one valid sample, 2 none, and of 3 nothing arrived.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform() -> torch.Tensor:
        return torch.rand(num_prompts, 4, generator=generator, dtype=torch.float64)

    arrived = uniform() < 0.9
    arrived[0], arrived[2], arrived[3] = True, True, False
    has_marker = arrived & (uniform() < 0.8)
    has_marker[0], has_marker[1], has_marker[2] = True, False, False
    arrived[1, 0] = has_marker[1, 0] = True
    valid = has_marker & (uniform() < 0.9)
    valid[0], valid[1, 0] = True, True
    return GroupScores(
        answer_logprob=level + 5 * uniform(),
        valid_mask=valid,
        arrived_mask=arrived,
        has_marker=has_marker,
        chain_length=(uniform() * 9).long() + 1,
        answer_length=(uniform() * 5).long() + 1,
        chain_log_ratio=uniform() - 0.4,
        verifiable_reward=(valid & (uniform() < 0.4)).double(),
    )


def map_tensors(record, function):
    """A copy of a record with every tensor replaced."""
    tensors = {f.name: getattr(record, f.name) for f in fields(record)}
    return replace(record, **{name: function(name, value) for name, value in tensors.items() if value is not None})


def credits_equal(left: SampleCredits, right: SampleCredits, tolerance: float = 0.0) -> None:
    for field in fields(SampleCredits):
        values = getattr(left, field.name), getattr(right, field.name)
        torch.testing.assert_close(*values, rtol=tolerance, atol=tolerance, msg=lambda m, f=field: f"{f.name}: {m}")


def on_ranks(rule: UpdateRule, scores: GroupScores, sizes: list[int]) -> SampleCredits:
    """The batch split over threads that reduce among themselves as data-parallel ranks do; credits joined again."""
    barrier, slots = threading.Barrier(len(sizes)), [None] * len(sizes)

    def reducer(rank: int, combine):
        def reduce(tensor: torch.Tensor) -> torch.Tensor:
            slots[rank] = tensor
            barrier.wait(timeout=30)
            result = combine(torch.stack(slots))
            barrier.wait(timeout=30)
            return result

        return reduce

    def run(rank: int) -> SampleCredits:
        begin = sum(sizes[:rank])
        part = map_tensors(scores, lambda name, value: value[begin : begin + sizes[rank]])
        return sample_credits(rule, part, reducer(rank, lambda t: t.sum(0)), reducer(rank, lambda t: t.amax(0)))

    with ThreadPoolExecutor(len(sizes)) as pool:
        parts = list(pool.map(run, range(len(sizes))))
    joined = {f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(SampleCredits)}
    return SampleCredits(**(joined | {"advantage_std": parts[0].advantage_std}))


# ---- What must not change the update


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("scope", ["batch", "group"])
@pytest.mark.parametrize("sizes", [[3, 4], [1, 2, 4], [1] * 7])
def test_a_batch_split_over_ranks_gets_the_credits_of_the_whole(name, scope, sizes):
    rule = replace(PAPER, name=name, std_scope=scope, kl_estimator="k1_reward" if scope == "group" else "k2_token")
    credits_equal(on_ranks(rule, batch(), sizes), sample_credits(rule, batch()), tolerance=1e-12)


def test_a_rank_that_kept_its_own_std_would_get_other_credits():
    """The test above can fail: without the reduction the two halves are scaled apart."""
    whole = sample_credits(PAPER, batch())
    half = sample_credits(PAPER, map_tensors(batch(), lambda name, value: value[:3]))
    assert (half.credit - whole.credit[:3]).abs().max() > 1e-3


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_what_stands_at_an_invalid_position_changes_no_credit(name, junk):
    rule = replace(PAPER, name=name, kl_estimator="k1_reward")
    clean = batch()
    counts = {"answer_logprob": clean.valid_mask, "chain_log_ratio": clean.arrived_mask}
    dirty = map_tensors(clean, lambda n, value: torch.where(counts[n], value, junk) if n in counts else value)
    credits_equal(sample_credits(rule, dirty), sample_credits(rule, clean))


@pytest.mark.parametrize("name", ["jepo", "jepo_single", "vr_cli", "prob_pg", "jepo_rl"])
def test_adding_a_constant_to_every_log_prob_changes_no_credit(name):
    """prob_pg too: scaled by the largest likelihood of the batch, it reads only differences."""
    rule = replace(PAPER, name=name)
    moved = sample_credits(rule, batch(level=-1e4))
    credits_equal(moved, sample_credits(rule, batch(level=-20.0)), tolerance=1e-8)
    assert moved.credit.abs().max() > 1e-3


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_failed_sample_counts_nowhere(name):
    """Removing it from the batch changes no other sample's credits."""
    kept = map_tensors(batch(), lambda n, value: value[:1])
    failed = map_tensors(kept, lambda n, value: value.clone())
    for mask in (failed.arrived_mask, failed.valid_mask, failed.has_marker):
        mask[0, 3] = False
    without = map_tensors(kept, lambda n, value: value[:, :3])
    rule = replace(PAPER, name=name)
    expected, got = sample_credits(rule, without), sample_credits(rule, failed)
    for field in ("credit", "answer_weight", "kl_weight"):
        torch.testing.assert_close(getattr(got, field)[:, :3], getattr(expected, field), rtol=1e-12, atol=1e-15)
        assert getattr(got, field)[0, 3] == 0


def test_micro_batches_sum_to_the_gradient_of_the_full_batch():
    """loss = -sum weight_t log pi(token_t) is additive: one backward over all equals one per sequence."""
    rule, scores = PAPER, batch()
    credits = sample_credits(rule, scores)
    logits = torch.randn(28, 12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    losses = []
    for n in range(28):
        p, i = divmod(n, 4)
        chain, answer = int(scores.chain_length[p, i]), int(scores.answer_length[p, i] * scores.valid_mask[p, i])
        logprobs = logits[n].log_softmax(-1)[: chain + answer, 0]
        sequence = SequenceLogprobs(
            chain_length=chain,
            answer_length=answer,
            policy_logprobs=logprobs,
            reference_logprobs=torch.full_like(logprobs, -1.0),
        )
        entries = [getattr(credits, f)[p, i].item() for f in ("credit", "answer_weight", "kl_weight")]
        losses.append(-(token_weights(rule, sequence, *entries) * logprobs).sum())
    (full,) = torch.autograd.grad(torch.stack(losses).sum(), logits, retain_graph=True)
    parts = [torch.stack(losses[begin:end]).sum() for begin, end in ((0, 5), (5, 6), (6, 28))]
    summed = sum(torch.autograd.grad(part, logits, retain_graph=True)[0] for part in parts)
    torch.testing.assert_close(summed, full)
    assert full.abs().max() > 0


# ---- Closed forms


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


# ---- Edges


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


# ---- Token weights


def sequence(**overrides) -> SequenceLogprobs:
    given = {
        "chain_length": 3,
        "answer_length": 2,
        "policy_logprobs": torch.tensor([-1.0, -2.0, -0.5, -3.0, -4.0]),
        "reference_logprobs": torch.tensor([-1.5, -1.0, -0.5, -9.0, -9.0]),
        "generation_logprobs": torch.tensor([-1.0, -2.0, -0.5]) - math.log(1.5),
    }
    return SequenceLogprobs(**(given | overrides))


def test_credit_falls_on_the_chain_and_answer_weight_on_the_answer():
    weights = token_weights(PLAIN, sequence(), 0.25, 0.125, 0.0)
    assert weights.tolist() == [0.25, 0.25, 0.25, 0.125, 0.125]
    assert weights.dtype == torch.float32 and not weights.requires_grad


def test_own_answers_carry_the_credit_too():
    assert token_weights(PLAIN, sequence(own_answer=True), 0.25, 0.125, 0.0).tolist() == [0.25] * 5


def test_kl_falls_on_the_chain_alone_and_pulls_towards_the_reference_policy():
    """r = 0.5, -1, 0: more likely than in the reference policy is pushed down."""
    assert token_weights(PLAIN, sequence(), 0.0, 0.0, 2.0).tolist() == [-1.0, 2.0, 0.0, 0.0, 0.0]
    rule = replace(PLAIN, kl_estimator="k2_sequence")
    assert token_weights(rule, sequence(own_answer=True), 0.0, 0.0, 2.0).tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_importance_sampling_multiplies_the_policy_gradient_alone():
    """A ratio of 1.5 per token, 1.5^3 = 3.375 capped at 2 per sequence; answer and KL weights are untouched."""
    for kind, ratio in (("token_truncated", 1.5), ("sequence_truncated", 2.0)):
        weights = token_weights(replace(PLAIN, importance_sampling=kind), sequence(), 1.0, 0.125, 2.0)
        expected = torch.tensor([ratio - 1.0, ratio + 2.0, ratio, 0.125, 0.125])
        torch.testing.assert_close(weights, expected)


def test_every_answer_token_of_a_sample_has_the_same_weight():
    """The misprint sum_t pi(a*_t) would weigh likely tokens more; the log of the product weighs all alike."""
    weights = token_weights(PAPER, sequence(), 0.1, 0.3, 1e-3)[3:]
    assert torch.equal(weights, torch.full((2,), 0.3))


@pytest.mark.parametrize(
    ("rule", "overrides", "name"),
    [
        (PLAIN, {"reference_logprobs": None}, "reference_logprobs"),
        (PLAIN, {"reference_logprobs": torch.zeros(3)}, "reference_logprobs"),
        (PLAIN, {"policy_logprobs": torch.zeros(4)}, "policy_logprobs"),
        (replace(PLAIN, importance_sampling="token_truncated"), {"generation_logprobs": None}, "generation_logprobs"),
        (replace(PLAIN, importance_sampling="token_truncated"), {"own_answer": True}, "generation_logprobs"),
    ],
)
def test_log_probs_that_the_rule_reads_must_be_there_and_fit(rule, overrides, name):
    with pytest.raises(ValueError, match=f"^{name}:"):
        token_weights(rule, sequence(**overrides), 1.0, 1.0, 1.0)


def test_an_empty_sequence_has_no_weights():
    nothing = torch.zeros(0)
    empty = sequence(chain_length=0, answer_length=0, policy_logprobs=nothing, reference_logprobs=nothing)
    assert token_weights(PLAIN, empty, 1.0, 1.0, 1.0).shape == (0,)
