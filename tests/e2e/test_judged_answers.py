"""`nemo-jepo evaluate` with a judge on the loopback address; a judge never gives a reward."""

import json
from typing import Any

from tests.support.command_line import metrics, run
from tests.support.fake_judge import FakeJudge, says, votes


def evaluated(folder, *overrides: str) -> tuple[dict[str, Any], str]:
    done = run("evaluate", folder, *overrides)
    return json.loads(done.stdout), done.stderr


def test_evaluate_reports_the_combined_accuracy_and_what_it_knows_it_never_asks_again(tmp_path):
    """A random model's answers are wrong by the verifier; this judge splits its votes 3 to 2 for every one of them."""
    key = tmp_path / "key"
    key.write_text("secret\n")
    key.chmod(0o600)
    with FakeJudge(votes(True, False, True, False, True)) as fake:
        fake.key = "secret"
        judge = [f"evaluation.judge.url={fake.base}", "evaluation.judge.model=m"]
        judge.append(f"evaluation.judge.api_key_file={key}")
        found, said = evaluated(tmp_path, *judge)
        num_requests = len(fake.requests)
    assert found["accuracy"] == 0.0
    assert found["combined_accuracy"] == found["judge_asked_rate"] > 0
    assert found["judge_correct_rate"] == 1.0
    assert found["judge_faults"] == 0
    assert num_requests % 5 == 0 and num_requests > 0
    assert "no verdict" not in said
    again, _ = evaluated(tmp_path, *judge)  # nobody listens there any more
    assert again == found


def test_evaluate_with_a_judge_that_is_down_reports_null_and_one_line(tmp_path):
    with FakeJudge() as fake:
        pass
    found, said = evaluated(tmp_path, f"evaluation.judge.url={fake.base}")
    assert found["combined_accuracy"] is None
    assert found["judge_faults"] > 0
    assert found["accuracy"] == 0.0
    (line,) = [line for line in said.splitlines() if "no verdict" in line]
    assert f"judge: {found['judge_faults']:.0f} of {found['judge_faults']:.0f} answers have no verdict" in line


def test_a_judge_that_calls_everything_correct_earns_no_reward(tmp_path):
    """rloo learns from the verifier, to which a random model is never right; only a validation asks the judge."""
    overrides = ["objective=rloo", "rollout.stop_at_marker=false", "trainer.jepo.max_steps=2"]
    with FakeJudge(says(True)) as fake:
        run("train", tmp_path, *overrides, f"evaluation.judge.url={fake.base}")
        num_requests = len(fake.requests)
    rows = metrics(tmp_path)
    assert [row["train_rollouts/reward"] for row in rows] == [0.0, 0.0]
    assert rows[-1]["val_rollouts/combined_accuracy"] > rows[-1]["val_rollouts/accuracy"] == 0.0
    assert num_requests <= 3 * 6 * 4  # votes * validation prompts * generations, in one validation
