"""Combined accuracy, by hand, with a judge on the loopback address."""

from typing import Any

import pytest

from nemo_jepo.config.judge import JudgeConfig, model_verifier_config
from nemo_jepo.config.schema import EvaluationConfig
from nemo_jepo.evaluate import arrived, judged_answers
from nemo_jepo.held_out import accuracy
from nemo_jepo.rewards import judged as judged_module
from nemo_jepo.rewards.judge_prompt import Case
from nemo_jepo.rewards.judged import Judges, cases_to_judge, combined_accuracies
from nemo_jepo.types import Prompt, Rollout
from nemo_jepo.utils import http
from tests.support.fake_judge import FakeJudge, prompt_of, says
from tests.support.one_rank import OneRank

PROMPT = Prompt(0, (1,), "2+2", "4")
ANSWERS = ["4", "four", "5", None, " ", "slow", "IV"]
VERDICTS = [1.0, 0.0, 0.0, 0.0, 0.0, None, 0.0]
"""The verifier's verdicts on them: "slow" was a fault; without a marker there is no answer."""


def judged(tmp_path, verdicts=VERDICTS, answers=ANSWERS, **settings: Any) -> dict[str, float]:
    """What `evaluate` reports: the verifier's accuracy and what judges add to it, one replica."""
    judges = Judges(EvaluationConfig(**settings), tmp_path)
    own = [(answer or "").strip() or None for answer in answers]
    rollouts = [Rollout(0, sample, (1,), (0.0,), "stop") for sample in range(len(answers))]
    cases = cases_to_judge([PROMPT], rollouts, own, verdicts)
    pairs = judged_answers(judges, OneRank(), cases, len(rollouts))
    pairs["accuracy"] = accuracy(arrived(rollouts, own, verdicts))
    means = {name: total / count for name, (total, count) in pairs.items() if count}
    return means | combined_accuracies(means)


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch):
    monkeypatch.setattr(http, "FIRST_BACKOFF_S", 0.001)


def warnings_of(caplog) -> list[str]:
    """What a user of the program reads, whatever level other loggers have."""
    return [record.getMessage() for record in caplog.records if record.name == judged_module.__name__]


def right(*answers: str):
    """A judge that calls these answers correct and others wrong."""
    return lambda body: says(any(line in answers for line in prompt_of(body).splitlines()))(body)


def test_the_judge_is_asked_about_answers_that_the_verifier_calls_wrong_and_adds_those_it_calls_right(tmp_path):
    """Right by the verifier: 1 of 7, a fault among them. By the judge: four and IV. r = 1, 1, 0, 0, 0, 0, 1: 3 of 7."""
    with FakeJudge(right("four", "IV")) as fake:
        found = judged(tmp_path, judge=JudgeConfig(url=fake.base))
        for answer in ("four", "5", "IV"):
            assert len(fake.about(answer)) == 3
        assert len(fake.requests) == 9
    assert found["accuracy"] == pytest.approx(1 / 7)
    assert found["combined_accuracy"] == pytest.approx(3 / 7)
    assert found["judge_faults"] == 0


def test_an_answer_that_makes_the_judge_fail_is_as_good_as_a_wrong_one(tmp_path, caplog):
    """Of four, 5 and IV the judge never says anything about IV: r = 1, 1, 0, 0, 0, 0, 0."""
    judge = right("four")
    with FakeJudge(lambda body: "?" if "IV" in prompt_of(body).splitlines() else judge(body)) as fake:
        found = judged(tmp_path, judge=JudgeConfig(url=fake.base))
    assert found["combined_accuracy"] == pytest.approx(2 / 7)
    assert found["judge_faults"] == 1
    (line,) = warnings_of(caplog)
    assert line.startswith("judge: 1 of 3 answers have no verdict and count as wrong (combined_accuracy): ")
    assert line.endswith("the reply does not end with a verdict line")


def test_a_judge_that_is_down_is_reported_and_is_no_accuracy_at_all(tmp_path, caplog):
    with FakeJudge() as fake:
        pass
    found = judged(tmp_path, judge=JudgeConfig(url=fake.base, model="m"))
    assert "combined_accuracy" not in found
    assert found["judge_faults"] == 3
    assert found["accuracy"] == pytest.approx(1 / 7)
    (line,) = warnings_of(caplog)
    assert "3 of 3 answers have no verdict and leave it out (combined_accuracy)" in line
    assert f"{fake.base}/chat/completions: ClientConnectorError" in line


def test_where_the_verifier_calls_nothing_wrong_nobody_is_asked(tmp_path):
    with FakeJudge() as fake:
        found = judged(tmp_path, verdicts=[1.0, 1.0], answers=["4", "4.0"], judge=JudgeConfig(url=fake.base))
        assert fake.requests == []
    assert found["combined_accuracy"] == 1.0


def test_an_answer_that_makes_the_verifier_fail_is_wrong_and_no_judge_is_asked_about_it(tmp_path):
    with FakeJudge() as fake:
        found = judged(tmp_path, verdicts=[None, None], answers=["4", "5"], judge=JudgeConfig(url=fake.base))
        assert fake.requests == []
    assert found == {"accuracy": 0.0, "combined_accuracy": 0.0, "judge_asked_rate": 0.0, "judge_faults": 0.0}


def test_a_model_verifier_is_a_second_metric_by_one_vote_of_its_own(tmp_path):
    settings = model_verifier_config()
    with FakeJudge(right("four")) as judge, FakeJudge(right("four", "IV", "5")) as verifier:
        settings.url = verifier.base
        found = judged(tmp_path, judge=JudgeConfig(url=judge.base), model_verifier=settings)
        assert len(verifier.requests) == 3
        assert {body["temperature"] for body in verifier.requests} == {0.0}
    assert found["combined_accuracy"] == pytest.approx(2 / 7)
    assert found["model_verified_accuracy"] == pytest.approx(4 / 7)
    assert found["model_verifier_faults"] == 0


def test_without_a_url_nothing_is_added(tmp_path):
    assert judged(tmp_path) == {"accuracy": pytest.approx(1 / 7)}


def test_a_key_that_is_gone_since_the_start_is_reported_like_any_fault(tmp_path, caplog):
    found = judged(tmp_path, judge=JudgeConfig(url="http://127.0.0.1:9/v1", api_key_file=str(tmp_path / "gone")))
    assert found["judge_faults"] == 3
    assert "evaluation.judge.api_key_file" in caplog.text and "no such file" in caplog.text


def test_ranks_without_a_sampler_are_told_the_verdicts(tmp_path):
    """Two were asked for, of four samples; one has no verdict."""
    other_rank = OneRank(is_replica_head=False, data_parallel_rank=1, share_in_replica=lambda value: [True, None])
    judges = Judges(EvaluationConfig(judge=JudgeConfig(url="http://127.0.0.1:9/v1")), tmp_path)
    found = judged_answers(judges, other_rank, [], 3)
    assert found == {
        "judge_asked_rate": (2.0, 3.0),
        "judge_answered_rate": (1.0, 2.0),
        "judge_correct_rate": (1.0, 1.0),
        "judge_faults": (1.0, 0.0),
    }


def test_the_runs_own_servers_are_asked_with_their_key_and_their_verdicts_are_not_kept(tmp_path):
    """Their weights change from one evaluation to the next."""
    with FakeJudge(says(True)) as one, FakeJudge(says(True)) as two:
        one.key = two.key = "servers-key"
        servers = (one.url, two.url), "servers-key"
        judges = Judges(EvaluationConfig(judge=JudgeConfig(url="rollout")), tmp_path, servers)
        found = judged_answers(judges, OneRank(), [Case("2+2", "4", "four")], 1)
        assert (len(one.requests), len(two.requests)) == (2, 1)
    assert found["judge_correct_rate"] == (1.0, 1.0)
    assert list(tmp_path.iterdir()) == []
