"""Held-out metrics on numbers that can be checked by hand, and models that try to look better than they are."""

import itertools
import math

import pytest
import torch

from nemo_jepo.held_out import (
    Graded,
    accuracies_at_k,
    accuracy,
    likelihoods,
    majority,
    median_over_prompts,
    pass_at,
    proxy_nll,
    verified_at_k,
)
from nemo_jepo.metrics import chain_gain
from nemo_jepo.objective.records import GroupScores

NAN = math.nan


def groups(answer_logprob: list[list[float]], valid: list[list[int]], **tables: list[list[int]]) -> GroupScores:
    def table(name: str, default: list[list[int]], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(tables.get(name, default), dtype=dtype)

    return GroupScores(
        answer_logprob=torch.tensor(answer_logprob, dtype=torch.float64),
        valid_mask=torch.tensor(valid, dtype=torch.bool),
        arrived_mask=table("arrived", [[1] * len(row) for row in valid], torch.bool),
        has_marker=table("has_marker", valid, torch.bool),
        chain_length=table("chain_length", valid, torch.int64),
        answer_length=table("answer_length", valid, torch.int64),
        chain_log_ratio=torch.zeros(len(valid), len(valid[0]), dtype=torch.float64),
    )


def means(scores: GroupScores) -> dict[str, float]:
    return {name: total / count for name, (total, count) in likelihoods(scores).items() if count}


def test_proxy_nll_is_minus_log_of_the_mean_likelihood():
    """Likelihoods 1/2 and 1/8: mean 5/16. The single-sample bound averages the logs: -(log 2 + log 8) / 2."""
    found = means(groups([[math.log(1 / 2), math.log(1 / 8)]], [[1, 1]], answer_length=[[3, 3]]))
    assert found["proxy_nll"] == pytest.approx(-math.log(5 / 16))
    assert found["bound"] == pytest.approx(math.log(5 / 16))
    assert found["single_sample_bound"] == pytest.approx(-2 * math.log(2))
    assert found["bound_gap"] == pytest.approx(math.log(5 / 16) + 2 * math.log(2))
    assert found["proxy_nll_per_token"] == pytest.approx(-math.log(5 / 16) / 3)
    assert found["effective_sample_size"] == pytest.approx((5 / 8) ** 2 / (1 / 4 + 1 / 64))


def test_long_answers_do_not_underflow():
    found = means(groups([[-5000.0, -5000.0]], [[1, 1]]))
    assert found["proxy_nll"] == pytest.approx(5000.0)


def test_invalid_samples_and_prompts_without_a_valid_one_are_in_no_bound():
    """Prompt 0: one valid of two. Prompt 1: none; whatever stands there counts nowhere but in valid_prompt_rate."""
    found = means(
        groups(
            [[-2.0, NAN], [NAN, -math.inf]],
            [[1, 0], [0, 0]],
            chain_length=[[10, 99], [99, 99]],
            answer_length=[[4, 0], [0, 0]],
        )
    )
    assert found["proxy_nll"] == pytest.approx(2.0 + math.log(2))
    assert found["proxy_nll_valid"] == pytest.approx(2.0)
    assert found["single_sample_bound"] == pytest.approx(-2.0)
    assert found["bound_gap"] == pytest.approx(0.0)
    assert found["proxy_nll_per_token"] == pytest.approx((2.0 + math.log(2)) / 4)
    assert found["effective_sample_size"] == pytest.approx(1.0)
    assert found["valid_prompt_rate"] == 0.5
    assert found["cot_tokens_mean"] == 10.0


def test_per_token_figures_weigh_prompts_by_their_answers():
    """3 nats over 1 token and 5 nats over 7: 8 / 8, not the mean of 3 and 5/7."""
    found = means(groups([[-3.0, -3.0], [-5.0, -5.0]], [[1, 1], [1, 1]], answer_length=[[1, 1], [7, 7]]))
    assert found["proxy_nll"] == pytest.approx(4.0)
    assert found["proxy_nll_per_token"] == pytest.approx(1.0)


def test_marker_rate_is_over_samples_that_arrived():
    found = means(groups([[-1.0] * 4], [[1, 0, 0, 0]], has_marker=[[1, 1, 0, 0]], arrived=[[1, 1, 1, 0]]))
    assert found["marker_rate"] == pytest.approx(2 / 3)


def test_a_rank_without_prompts_adds_nothing():
    empty = torch.zeros(0, 4)
    none = GroupScores(
        answer_logprob=empty,
        valid_mask=empty.bool(),
        arrived_mask=empty.bool(),
        has_marker=empty.bool(),
        chain_length=empty.long(),
        answer_length=empty.long(),
        chain_log_ratio=empty,
    )
    assert set(likelihoods(none).values()) == {(0.0, 0.0)}


def test_a_sample_without_the_marker_has_likelihood_zero_and_one_that_never_arrived_is_no_sample():
    """Likelihood 1/2 of one sample: beside an invalid one the mean is 1/4, beside a failed one 1/2."""
    scores = groups([[math.log(1 / 2), NAN]] * 2, [[1, 0]] * 2, arrived=[[1, 1], [1, 0]])
    assert proxy_nll(scores).tolist() == pytest.approx([math.log(4), math.log(2)])


def test_the_proxy_nll_of_a_prompt_without_a_valid_sample_is_infinite_and_without_a_sample_unknown():
    scores = groups([[NAN, NAN]] * 2, [[0, 0]] * 2, arrived=[[1, 0], [0, 0]])
    infinite, unknown = proxy_nll(scores).tolist()
    assert infinite == math.inf and math.isnan(unknown)
    assert means(scores) == {"marker_rate": 0.0, "valid_prompt_rate": 0.0}  # of the one that arrived


def test_the_chain_gain_is_over_valid_samples():
    found = chain_gain(groups([[-1.0, NAN], [-3.0, -5.0]], [[1, 0], [1, 1]]), torch.tensor([-4.0, -3.5]))
    assert found.tolist() == [[3.0, 0.0], [0.5, -1.5]]


def test_a_median_is_over_the_prompts_of_all_replicas_and_infinity_is_a_value():
    """Replica 0 of 2 has prompts 0, 2 and 4 of five; the other one's are 8 and inf."""

    def of(*own: float) -> float | None:
        def both(mine: torch.Tensor) -> torch.Tensor:
            return mine + torch.tensor([0, 8.0, 0, math.inf, 0])

        return median_over_prompts(torch.tensor(own), range(0, 5, 2), 5, both)

    assert of(1.0, 2.0, 3.0) == 3.0
    assert of(1.0, math.nan, 3.0) == 5.5  # the mean of 3 and 8
    assert of(math.inf, math.inf, 3.0) is None
    assert median_over_prompts(torch.tensor([math.nan]), [0], 1, lambda own: own) is None


# ---- own answers


def graded(*answers: tuple[str | None, float | None], group: int = 0) -> list[Graded]:
    return [Graded(group, answer, verdict) for answer, verdict in answers]


@pytest.mark.parametrize("num_right", range(6))
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_sample(num_right):
    samples = [1] * num_right + [0] * (5 - num_right)
    for k in range(1, 6):
        subsets = list(itertools.combinations(samples, k))
        assert pass_at(k, 5, num_right) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_is_unbiased_where_the_likeliest_of_k_is_not():
    """Chance p of a right sample, n = 4: the mean over all numbers of right samples is 1 - (1 - p)^2."""
    p = 0.3
    mean = sum(math.comb(4, c) * p**c * (1 - p) ** (4 - c) * pass_at(2, 4, c) for c in range(5))
    assert mean == pytest.approx(1 - (1 - p) ** 2)


RIGHT, WRONG = ("4", 1.0), ("5", 0.0)


def test_the_majority_is_of_equal_texts_and_a_tie_counts_by_its_share():
    assert majority(graded(RIGHT, RIGHT, WRONG, ("6", 0.0))) == 1
    assert majority(graded(RIGHT, WRONG, WRONG, ("6", 0.0))) == 0
    assert majority(graded(RIGHT, RIGHT, WRONG, WRONG)) == 1 / 2
    assert majority(graded(RIGHT, WRONG, ("6", 0.0), ("7", 0.0))) == 1 / 4
    assert majority(graded((" The  Nile.", 1.0), ("the nile", 1.0), ("Rhine", 0.0))) == 1
    assert majority(graded(("**42**", 1.0), ("$42$.", 1.0), ("41", 0.0), ("40", 0.0))) == 1
    assert majority(graded(("1/2", 1.0), ("0.5", 1.0), ("2/3", 0.0), ("4/6", 0.0))) == 1 / 2  # right or wrong alike


def test_metrics_over_k_samples_are_means_over_prompts_of_which_all_k_arrived():
    """Prompt 0: 1 of 3 right, three answers. Prompt 1: 2 of 3, agreed on. Prompt 2: one sample was lost."""
    first = graded(RIGHT, WRONG, ("6", 0.0))
    second = graded(("7", 1.0), ("7", 1.0), (None, 0.0), group=1)
    third = graded(RIGHT, RIGHT, group=2)
    found = accuracies_at_k([*first, *second, *third], 3)
    assert {name: total / count for name, (total, count) in found.items()} == pytest.approx(
        {
            "avg_at_3": (1 / 3 + 2 / 3) / 2,
            "pass_at_2": (2 / 3 + 1) / 2,  # of {RW, RW, WW} and {RR, RN, RN}
            "pass_at_3": 1.0,
            "maj_at_3": (1 / 3 + 1) / 2,
        }
    )
    assert set(accuracies_at_k([], 8)) == {"avg_at_8", "pass_at_2", "pass_at_4", "pass_at_8", "maj_at_8"}


# ---- what does not pay: an honest model answers every sample; others hide what they are unsure of


HONEST_LOGPROBS = [[-0.1, -0.2, -0.3, -0.4], [-0.5, -6.0, -7.0, -8.0], [-9.0, -9.5, -10.0, -12.0]]
HONEST_ANSWERS = [[RIGHT] * 4, [RIGHT, WRONG, ("6", 0.0), ("7", 0.0)], [WRONG, WRONG, ("6", 0.0), ("7", 0.0)]]
UNANSWERED = (None, 0.0)
QUALITY = ("accuracy", "avg_at_4", "pass_at_2", "pass_at_4", "maj_at_4", "marker_rate", "valid_prompt_rate")


def quality(valid: list[list[int]], answers: list[list[tuple[str | None, float | None]]]) -> dict[str, float]:
    """What an evaluation says of a model's quality; for each, more is better."""
    scores = groups(HONEST_LOGPROBS, valid)
    own = [one for group, row in enumerate(answers) for one in graded(*row, group=group)]
    pairs = {"accuracy": accuracy(own)} | accuracies_at_k(own, 4)
    median = median_over_prompts(proxy_nll(scores), range(len(valid)), len(valid), lambda own: own)
    nll = proxy_nll(scores)
    found = means(scores) | {name: total / count for name, (total, count) in pairs.items()}
    return {name: found[name] for name in QUALITY} | {
        "proxy_nll_median": -math.inf if median is None else -median,
        **{f"proxy_nll of prompt {prompt}": -value for prompt, value in enumerate(nll.tolist())},
    }


HONEST = quality([[1] * 4] * 3, HONEST_ANSWERS)


@pytest.mark.parametrize("least", [-0.35, -5.0, -8.5, -11.0, 0.0])
def test_no_metric_of_quality_is_better_for_a_model_that_writes_the_marker_only_where_it_is_sure(least):
    """It answers where l_i is at least so much; with 0 it never does. A prompt that it leaves out wholly costs too."""
    valid = [[int(logprob >= least) for logprob in row] for row in HONEST_LOGPROBS]
    answers = [
        [answer if kept else UNANSWERED for kept, answer in zip(*rows, strict=True)]
        for rows in zip(valid, HONEST_ANSWERS, strict=True)
    ]
    found = quality(valid, answers)
    assert all(found[name] <= value for name, value in HONEST.items()), (found, HONEST)
    assert found["marker_rate"] < HONEST["marker_rate"]


def test_the_metrics_over_valid_samples_alone_can_be_gamed_which_is_why_the_others_stand_beside_them():
    """Only the likeliest sample of each prompt has the marker."""
    honest, sure = (means(groups(HONEST_LOGPROBS, [row] * 3)) for row in ([1] * 4, [1, 0, 0, 0]))
    assert sure["proxy_nll_valid"] < honest["proxy_nll_valid"]
    assert sure["proxy_nll"] > honest["proxy_nll"]


def test_a_fault_of_the_verifier_is_as_good_as_a_wrong_answer_and_no_better():
    faulted = [[one if one[1] == 1 else ("9^{9^{9^9}}", None) for one in row] for row in HONEST_ANSWERS]
    wrong = [[one if one[1] == 1 else ("9^{9^{9^9}}", 0.0) for one in row] for row in HONEST_ANSWERS]
    every = [[1] * 4] * 3
    assert quality(every, faulted) == quality(every, wrong)
    assert quality(every, faulted)["accuracy"] == HONEST["accuracy"]


def test_to_withhold_ones_wrong_answers_does_not_help_the_majority():
    """One right answer of four: alone beside three samples without an answer it has lost, whatever they would say."""
    assert majority(graded(RIGHT, UNANSWERED, UNANSWERED, UNANSWERED)) == 0
    for wrong in itertools.product(("5", "6", "7", None), repeat=3):
        said = [RIGHT, *((text, 0.0) for text in wrong)]
        as_an_answer = [RIGHT, *(("nothing" if text is None else text, 0.0) for text in wrong)]
        assert majority(graded(*said)) == majority(graded(*as_an_answer))


# ---- own verdicts ----------------------------------------------------------------------------------------------------


def test_own_verdicts_by_hand():
    """Two prompts of four samples. 1: the majority is wrong, the verdicts know it. 2: two answers are absent."""
    samples = [
        *graded(("7", 0.0), ("7", 0.0), ("7", 0.0), ("42", 1.0)),
        *graded((None, 0.0), (None, 0.0), ("5", 1.0), ("6", 0.0), group=1),
    ]
    confidences = [0.1, 0.2, 0.1, 0.9, 0.0, 0.0, 0.3, 0.3]
    found = verified_at_k(samples, confidences, 4)
    assert found["maj_at_4"] == (0.0, 2.0)
    assert found["weighted_maj_at_4"] == (1.0 + 0.5, 2.0)
    assert found["best_at_4"] == (1.0 + 0.5, 2.0)
    assert found["verdict_of_right"] == (pytest.approx(1.2), 2.0)
    assert found["verdict_of_wrong"] == (pytest.approx(0.7), 4.0)
    assert found["verdict_accuracy"] == (5.0, 6.0)


def test_smaller_numbers_of_samples_are_means_over_blocks_of_them():
    samples = graded(*[("1", 1.0)] * 4, *[("2", 0.0)] * 4)
    confidences = [0.5] * 4 + [0.6] * 4
    found = verified_at_k(samples, confidences, 8)
    assert set(found) >= {"maj_at_4", "maj_at_8", "best_at_4", "best_at_8", "weighted_maj_at_4", "weighted_maj_at_8"}
    assert found["best_at_4"] == (0.5, 1.0) and found["best_at_8"] == (0.0, 1.0)
    assert found["maj_at_8"] == (0.5, 1.0) and found["weighted_maj_at_8"] == (0.0, 1.0)


def test_a_prompt_that_lost_a_sample_is_left_out_and_equal_confidences_vote_as_the_majority():
    samples = [*graded(("1", 1.0), ("1", 1.0), ("2", 0.0)), *graded(*[("3", 1.0)] * 3, ("4", 0.0), group=1)]
    found = verified_at_k(samples, [0.5] * 7, 4)
    assert found["maj_at_4"] == found["weighted_maj_at_4"] == (1.0, 1.0)
    assert found["best_at_4"] == (0.75, 1.0)
    assert verified_at_k([], [], 4)["best_at_4"] == (0.0, 0.0)
