"""What a step shows of its prompts: pass rates and spreads in closed form, the same from any split over replicas."""

import math
from collections.abc import Sequence

import pytest
import torch

from nemo_jepo.lessons import Lessons, pass_rate, verified
from nemo_jepo.objective.records import GroupScores
from nemo_jepo.types import Prompt
from tests.support.one_rank import OneRank
from tests.unit.objective.batches import rule_of


def groups(
    logprob: Sequence[Sequence[float]],
    valid: Sequence[Sequence[bool]],
    arrived: Sequence[Sequence[bool]] | None = None,
    rewards: Sequence[Sequence[float]] | None = None,
) -> GroupScores:
    """Answers of two tokens."""
    table = torch.tensor(logprob, dtype=torch.float64)
    return GroupScores(
        answer_logprob=table,
        valid_mask=torch.tensor(valid),
        arrived_mask=torch.ones_like(table).bool() if arrived is None else torch.tensor(arrived),
        has_marker=torch.tensor(valid),
        chain_length=torch.ones_like(table).long(),
        answer_length=torch.full_like(table, 2).long(),
        chain_log_ratio=torch.zeros_like(table),
        verifiable_reward=None if rewards is None else torch.tensor(rewards),
    )


PROMPTS = [Prompt(i, (i,), "q", "a") for i in range(4)]
HALF, WHOLE = 2 * math.log(0.5), 0.0
"""Log-probs of an answer of two tokens, each as likely as that."""


def test_by_likelihood_the_pass_rate_is_the_mean_probability_of_a_token():
    scores = groups(
        [[HALF, WHOLE], [HALF, -math.inf], [WHOLE, math.nan], [0.0, 0.0]],
        valid=[[True, True], [True, True], [True, False], [False, False]],
        arrived=[[True, True], [True, True], [True, True], [False, False]],
    )
    found = pass_rate(scores, verified(rule_of("jepo"), PROMPTS, scores))
    assert found[:3].tolist() == pytest.approx([0.75, 0.25, 0.5])  # a sample without the marker is not right
    assert math.isnan(found[3])  # no sample arrived


def test_where_a_verifier_reads_own_answers_the_pass_rate_is_the_share_of_right_ones():
    """In jepo_rl an answer that no verifier can tell goes by likelihood; in rloo it is never right."""
    prompts = [*PROMPTS[:2], Prompt(2, (2,), "q", "a", verifiable=False), PROMPTS[3]]
    scores = groups(
        [[HALF, HALF]] * 4,
        valid=[[True, True]] * 4,
        arrived=[[True, True], [True, True], [True, True], [True, False]],
        rewards=[[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, math.nan]],
    )
    by_name = {
        name: pass_rate(scores, verified(rule_of(name), prompts, scores)).tolist() for name in ("jepo_rl", "rloo")
    }
    assert by_name["jepo_rl"] == pytest.approx([0.5, 0.0, 0.5, 1.0])
    assert by_name["rloo"] == pytest.approx([0.5, 0.0, 0.0, 1.0])


def test_every_split_over_replicas_tells_the_same_in_the_order_of_the_global_batches():
    """Two batches of a step, of four prompts; two replicas have two prompts of each."""
    values = torch.linspace(-3.0, -0.5, 16, dtype=torch.float64).view(2, 4, 2)
    rule, valid = rule_of("jepo_single"), [[True, True]] * 4

    def noted(lessons: Lessons, of: slice) -> Lessons:
        for batch in values:
            lessons.note(PROMPTS[of], groups(batch[of].tolist(), valid[of]))
        return lessons

    expected = noted(Lessons(rule, OneRank()), slice(0, 4)).take()
    assert [one.spread for one in expected] == pytest.approx((values.diff(dim=-1) / 2).flatten().tolist())
    assert [one.pass_rate for one in expected] == pytest.approx((values / 2).exp().mean(-1).flatten().tolist())

    tables: list[torch.Tensor] = []  # what each replica gives to the sum

    def gather(table: torch.Tensor) -> torch.Tensor:
        tables.append(table)
        return table

    for rank in range(2):
        layout = OneRank(data_parallel_rank=rank, data_parallel_size=2, sum_over_data_parallel=gather)
        noted(Lessons(rule, layout), slice(2 * rank, 2 * rank + 2)).take()
    for rank in range(2):
        layout = OneRank(
            data_parallel_rank=rank, data_parallel_size=2, sum_over_data_parallel=lambda _: tables[0] + tables[1]
        )
        assert noted(Lessons(rule, layout), slice(2 * rank, 2 * rank + 2)).take() == expected


def test_a_step_begins_without_the_notes_of_the_one_before():
    lessons = Lessons(rule_of("jepo_single"), OneRank())
    for logprob in (-1.0, -2.0):
        lessons.note(PROMPTS[:1], groups([[logprob, logprob]], [[True, True]]))
        assert lessons.take() == [(pytest.approx(math.exp(logprob / 2)), 0.0)]


def test_a_prompt_of_which_no_sample_arrived_shows_nothing():
    lessons = Lessons(rule_of("jepo_single"), OneRank())
    lessons.note(PROMPTS[:1], groups([[0.0, 0.0]], [[False, False]], [[False, False]]))
    (one,) = lessons.take()
    assert math.isnan(one.pass_rate) and math.isnan(one.spread)
