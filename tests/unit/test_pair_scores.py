"""Rewards of pairs by hand: who is scored, what a score earns, and what a fault does."""

from dataclasses import replace
from typing import Any

import pytest

from nemo_jepo.config.judge import score_judge_config
from nemo_jepo.grading import RuleReward
from nemo_jepo.pair_scores import ScoreReward
from nemo_jepo.types import Prompt, Rollout
from nemo_jepo.utils import http
from tests.support.fake_judge import FakeJudge, prompt_of, scores
from tests.support.one_rank import OneRank
from tests.support.own_answers import Rule, Written, means, rollouts_of

SUM = Prompt(0, (1,), "What is 2+2?", "4")
POEM = Prompt(1, (1,), "Write a line about rain.", "It falls.", verifiable=False)
QUALITY = {"It pours.": 7.5, "Rain.": 2.0, "5": 1.0, "6": 3.0, "No.": 0.0}


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch):
    monkeypatch.setattr(http, "FIRST_BACKOFF_S", 0.001)


def reward(folder, base: str, answers: list[str | None]) -> ScoreReward:
    judge = replace(score_judge_config(), url=base, model="m")
    written, layout = Written(answers), OneRank()
    return ScoreReward(judge, RuleReward(Rule(), written, layout), written, layout, folder, None)


def test_where_no_sample_is_rewarded_each_own_answer_is_scored_and_elsewhere_the_verifier_has_the_word(tmp_path):
    """Samples 0-2 of a solved prompt; 3-8 of one that nobody verifies: no answer, blank, failed, two alike."""
    answers = ["4", "5", None, "It pours.", None, "", "Rain.", None, "It pours."]
    lost = Rollout(1, 7, (), (), "failed")
    rollouts = rollouts_of([0, 0, 0, 1, 1, 1, 1, 1, 1])
    rollouts[7] = lost
    with FakeJudge(scores(QUALITY.get)) as fake:
        scored = reward(tmp_path, fake.base, answers)
        found = scored.of([SUM, POEM], rollouts, step=0)
        assert len(fake.requests) == 2  # equal answers once
        for part in ("Write a line about rain.", "It falls."):
            assert all(part in prompt_of(body).splitlines() for body in fake.requests)
    assert found == [1.0, 0.0, 0.0, 0.75, 0.0, 0.0, 0.2, None, 0.75]
    assert means(scored) == {"score_asked_rate": 3 / 8, "score_fault_rate": 0.0, "score_mean": pytest.approx(17 / 3)}
    assert means(scored) == {}  # the next step begins anew


def test_samples_that_the_verifier_calls_wrong_or_fails_over_are_scored_where_none_is_right(tmp_path):
    with FakeJudge(scores(lambda answer: QUALITY.get(answer, 4.0))) as fake:
        assert reward(tmp_path, fake.base, ["5", "6", "slow"]).of([SUM], rollouts_of([0] * 3), 0) == [0.1, 0.3, 0.4]
        assert reward(tmp_path, fake.base, ["4", "6", "slow"]).of([SUM], rollouts_of([0] * 3), 0) == [1.0, 0.0, None]


@pytest.mark.parametrize("reply", ["I cannot say.", "Score 1", "The final answer is 11"])
def test_no_score_is_a_fault_of_that_sample_alone_and_one_line_says_why(tmp_path, caplog, reply):
    judge = scores(QUALITY.get)
    with FakeJudge(lambda body: reply if "Rain." in prompt_of(body) else judge(body)) as fake:
        scored = reward(tmp_path, fake.base, ["It pours.", "Rain.", None])
        for step in (0, 1):
            assert scored.of([POEM], rollouts_of([0, 0, 0]), step) == [0.75, None, 0.0]
            found = means(scored)
            assert found["score_fault_rate"] == 1 / 2 and found["score_mean"] == 7.5
    (line,) = [record.getMessage() for record in caplog.records if record.name == "nemo_jepo.rewards.judge"]
    assert line == "dpo.judge: 1 of 2 answers have no score: the reply does not end with a score line"


def test_a_judge_that_is_down_leaves_what_it_was_asked_about_without_a_score(tmp_path):
    with FakeJudge() as fake:
        pass
    scored = reward(tmp_path, fake.base, ["It pours.", None, "4"])
    assert scored.of([POEM, SUM], rollouts_of([0, 0, 1]), step=0) == [None, 0.0, 1.0]


def test_a_score_is_asked_for_once_and_a_cached_one_of_another_kind_is_none(tmp_path):
    with FakeJudge(scores(QUALITY.get)) as fake:
        for step in (0, 1):
            assert reward(tmp_path, fake.base, ["Rain.", "No."]).of([POEM], rollouts_of([0, 0]), step) == [0.2, 0.0]
        assert len(fake.requests) == 2
        file = tmp_path / "judge_scores.jsonl"
        file.write_text(file.read_text().replace('"score": 2.0', '"score": true'))
        reward(tmp_path, fake.base, ["Rain.", "No."]).of([POEM], rollouts_of([0, 0]), step=2)
        assert len(fake.requests) == 3


class Told:
    """A verifier's reward on a rank that is told of it."""

    def of(self, prompts: Any, rollouts: Any, step: int) -> list[float | None]:
        return [0.0] * len(rollouts)

    def metrics(self) -> dict:
        return {"rule_reward": (0.0, 2.0)}


def test_a_rank_that_is_no_replica_head_asks_nobody_and_is_told_what_the_head_knows(tmp_path):
    layout = OneRank(is_replica_head=False, share_in_replica=lambda mine: ([0.75, None], [7.5, None]))
    settings = replace(score_judge_config(), url="http://127.0.0.1:9/v1")
    scored = ScoreReward(settings, Told(), Written([]), layout, tmp_path, None)
    assert scored.of([POEM], rollouts_of([0, 0]), step=0) == [0.75, None]
    expected = {"rule_reward": 0.0, "score_asked_rate": 1.0, "score_fault_rate": 0.5, "score_mean": 7.5}
    assert means(scored) == expected
    assert list(tmp_path.iterdir()) == []
