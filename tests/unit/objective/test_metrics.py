"""Reported figures of a batch that is small enough to work out by hand."""

import math
from dataclasses import replace

import pytest
import torch

from nemo_jepo.metrics import update_metrics, without_valid_sample
from nemo_jepo.objective import GroupScores, sample_weights
from nemo_jepo.objective.tables import group_scores
from nemo_jepo.types import Scores, Spliced, SplicedBatch
from tests.unit.objective.batches import batch, map_tensors
from tests.unit.objective.tabular import PLAIN

RULE = replace(PLAIN, normalize=True, kl_beta=1e-3)


def two_prompts() -> GroupScores:
    """First: likelihoods 1/2 and 1/8. Second: one without marker, one failed."""
    return GroupScores(
        answer_logprob=torch.tensor([[0.5, 0.125], [math.nan, math.nan]], dtype=torch.float64).log(),
        valid_mask=torch.tensor([[True, True], [False, False]]),
        arrived_mask=torch.tensor([[True, True], [True, False]]),
        has_marker=torch.tensor([[True, True], [False, False]]),
        chain_length=torch.tensor([[4, 8], [100, 0]]),
        answer_length=torch.tensor([[2, 2], [0, 0]]),
        chain_log_ratio=torch.tensor([[0.1, 0.2], [0.6, math.nan]], dtype=torch.float64),
        chain_k3=torch.tensor([[0.01, 0.02], [0.06, math.nan]], dtype=torch.float64),
        verifiable_reward=torch.tensor([[0.0, 0.0], [0.0, math.nan]]),
        faulted_mask=torch.zeros(2, 2, dtype=torch.bool),
        ends_mask=torch.tensor([[True, True], [False, False]]),
        end_logprob=torch.tensor([[-0.25, -0.75], [math.nan, math.nan]]),
    )


def means(metrics: dict[str, tuple[float, float]]) -> dict[str, float]:
    return {name: total / count for name, (total, count) in metrics.items() if count}


def test_every_figure_of_a_small_batch():
    scores = two_prompts()
    got = means(update_metrics(RULE, scores, sample_weights(RULE, scores)))
    multi, single = math.log((0.5 + 0.125) / 2), (math.log(0.5) + math.log(0.125)) / 2
    raw = [multi - math.log(0.125), multi - math.log(0.5)]
    expected = {
        "bound": multi,
        "single_sample_bound": single,
        "bound_gap": multi - single,
        "effective_sample_size": 1 / (0.8**2 + 0.2**2),
        "arrived_rate": 3 / 4,
        "marker_rate": 2 / 3,
        "valid_rate": 2 / 3,
        "cot_tokens_mean": 6.0,
        "answer_tokens_mean": 2.0,
        "advantage_std": abs(raw[0] - raw[1]) / 2,
        "advantage_clip_fraction": 0.5,
        "reward": 0.0,
        "reward_advantage_std": 0.0,
        "verifier_fault_rate": 0.0,
        "verifiable_prompt_rate": 0.0,
        "kl": 0.3,
        "kl_k3": 0.03,
        "end_logprob": -0.5,
    }
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert math.isclose(got[name], value, rel_tol=1e-9, abs_tol=1e-12), name


@pytest.mark.parametrize("form", ["marker_and_end", "paper"])
def test_a_format_loss_reports_the_std_of_its_reward(form):
    """Rewards 0 and -10 of one prompt with two arrived: advantages 10 and -10."""
    scores = two_prompts()
    scores.arrived_mask[1, 1] = scores.has_marker[1, 1] = True
    rule = replace(RULE, format_loss=form)
    found = means(update_metrics(rule, scores, sample_weights(rule, scores)))["format_advantage_std"]
    assert found == pytest.approx(math.sqrt((10**2 + 10**2) / 4))


def test_the_end_of_turn_is_the_last_token_behind_a_reference_answer():
    """Two samples of three and two answer tokens; the second answer ends no turn."""
    common = {"group": 0, "token_ids": (0,) * 6, "prompt_length": 1, "valid": True, "has_marker": True}
    sequences = [
        Spliced(sample=0, chain_length=2, answer_length=3, ends=True, **common),
        Spliced(sample=1, chain_length=3, answer_length=2, **common),
    ]
    logprobs = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0])
    scores = group_scores(SplicedBatch(sequences=sequences, group_size=2), Scores((logprobs, logprobs)))
    assert scores.answer_logprob.tolist() == [[-28.0, -24.0]]
    assert scores.ends_mask.tolist() == [[True, False]] and scores.end_logprob[0, 0] == -16.0
    assert update_metrics(RULE, scores, sample_weights(RULE, scores))["end_logprob"] == (-16.0, 1.0)


def test_the_chain_gain_is_reported_where_the_answer_was_scored_without_a_chain():
    """l = -3 and -5 (and an invalid sample) behind chains, -1 - 3 behind none."""
    scores = replace(
        map_tensors(batch(), lambda n, value: value[:1]),
        answer_logprob=torch.tensor([[-3.0, -5.0, -9.0, -9.0]]),
        valid_mask=torch.tensor([[True, True, False, False]]),
        no_chain_logprobs=torch.tensor([[-1.0, -3.0, 0.0]]),
    )
    found = update_metrics(RULE, scores, sample_weights(RULE, scores))
    assert found["chain_gain"] == (0.0, 2.0) and found["no_chain_nll"] == (4.0, 1.0)
    unscored = replace(scores, no_chain_logprobs=None)
    assert not {"chain_gain", "no_chain_nll"} & set(update_metrics(RULE, unscored, sample_weights(RULE, unscored)))


@pytest.mark.parametrize(
    ("changes", "means", "said"),
    [
        (
            {},
            {"marker_rate": 0.0, "format_advantage_std": 0.0},
            "no completion has the answer marker, so nothing but the KL acts. Show",
        ),
        ({"kl_beta": 0.0}, {"marker_rate": 0.0}, "no completion has the answer marker, so nothing acts. Show"),
        ({"format_weight": 0.0}, {"marker_rate": 0.5, "format_advantage_std": 4.0}, "so nothing but the KL acts. Look"),
        (
            {},
            {"marker_rate": 0.5, "format_advantage_std": 4.0},
            "none is valid, so nothing but the format loss and the KL",
        ),
        (
            {},
            {"marker_rate": 1.0, "format_advantage_std": 0.0},
            "none is valid, so nothing but the KL acts. Look at misaligned",
        ),
    ],
)
def test_a_batch_without_a_valid_sample_says_why_and_what_still_acts(changes, means, said):
    assert said in without_valid_sample(replace(RULE, **changes), means)


@pytest.mark.parametrize("name", ["jepo", "rloo", "jepo_rl", "sft"])
def test_figures_of_two_ranks_add_up_to_those_of_the_batch(name):
    """Each prompt on its own rank, with the coefficients of the whole batch."""
    rule, scores = replace(RULE, name=name), two_prompts()
    scores = replace(scores, verifiable_reward=torch.tensor([[1.0, 0.0], [0.0, math.nan]]))
    coefficients = sample_weights(rule, scores)
    parts = [
        update_metrics(
            rule,
            map_tensors(scores, lambda name, value, p=p: value[p : p + 1]),
            map_tensors(coefficients, lambda name, value, p=p: value if name == "advantage_std" else value[p : p + 1]),
        )
        for p in range(2)
    ]
    summed = {k: tuple(sum(part[k][i] for part in parts) for i in range(2)) for k in parts[0]}
    assert parts[0].keys() == parts[1].keys()
    assert means(summed) == pytest.approx(means(update_metrics(rule, scores, coefficients)))


def test_prompts_that_train_on_a_reward_have_no_bound():
    rule, scores = replace(RULE, name="rloo"), two_prompts()
    metrics = update_metrics(rule, scores, sample_weights(rule, scores))
    assert metrics["bound"] == (0.0, 0.0)
    assert metrics["verifiable_prompt_rate"] == (2.0, 2.0)


def test_without_a_kl_term_no_kl_is_reported():
    rule = replace(RULE, kl_beta=0.0)
    assert not {"kl", "kl_k3"} & update_metrics(rule, two_prompts(), sample_weights(rule, two_prompts())).keys()
