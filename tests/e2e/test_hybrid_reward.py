"""rloo with a model verifier behind the rule: `nemo-jepo train` as a whole, against one on the loopback address."""

import json

import pytest

from nemo_jepo.checkpoint.format import latest_checkpoint
from nemo_jepo.rewards.canaries import canaries
from tests.support.command_line import command, metrics, run
from tests.support.fake_judge import Body, FakeJudge, prompt_of, says
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.quick

RLOO = ["objective=rloo", "rollout.stop_at_marker=false", "objective.reward=hybrid", "trainer.jepo.max_steps=3"]
LINES = {text.splitlines()[0] for text in canaries("").values() if text}


def honest(body: Body) -> str:
    """Calls half of the answers right, by their length, and no canary; the question itself is one."""
    lines = prompt_of(body).splitlines()
    first = next(number for number, line in enumerate(lines) if line.endswith("student answer")) + 1
    answer = "\n".join(lines[first:-6])
    is_canary = lines[first] in LINES or lines.count(lines[first]) > 1
    return says(not is_canary and len(answer) % 2 == 0)(body)


def test_the_model_rewards_what_the_rule_does_not_and_both_are_reported(tmp_path):
    """To the rule a random model is never right. Two ranks of one replica ask once, and are told the same."""
    with FakeJudge(honest) as fake:
        verifier = [f"hybrid.verifier.url={fake.base}", "hybrid.canary_interval=2", "hybrid.canary_prompts=1"]
        run("train", tmp_path / "one", *RLOO, *verifier)
        num_requests = len(fake.requests)
        two = ["model.tensor_model_parallel_size=2", "trainer.devices=2", "hybrid.verifier.cache=null"]
        run_ranks(2, command("train", tmp_path / "two", *RLOO, *verifier, *two))
    rows = metrics(tmp_path / "one")
    assert all(row["train_rollouts/rule_reward"] == 0.0 for row in rows)
    assert all(row["train_rollouts/reward"] == row["train_rollouts/hybrid_reward"] > 0.0 for row in rows)
    assert all(row["train_rollouts/hybrid_fault_rate"] == 0.0 for row in rows)
    assert ["train_rollouts/verifier_canary_rate" in row for row in rows] == [True, False, True]
    assert num_requests > 26
    other = metrics(tmp_path / "two")
    for name in ("hybrid_reward", "hybrid_asked_rate", "verifier_canary_rate"):
        assert rows[0][f"train_rollouts/{name}"] == other[0][f"train_rollouts/{name}"]
    verdicts = (tmp_path / "one" / "verifier_verdicts.jsonl").read_text().splitlines()
    assert {json.loads(line)["correct"] for line in verdicts} == {True, False}


def test_a_verifier_that_calls_everything_right_ends_the_run_which_saves_first(tmp_path):
    with FakeJudge(says(True)) as fake:
        base = [*RLOO, f"hybrid.verifier.url={fake.base}"]
        done = run("train", tmp_path, *base, expect=1)
        (line,) = [line for line in (done.stdout + done.stderr).splitlines() if "answer nothing" in line]
        assert "the run saves after step 0 and ends: 26 of 26 answers that answer nothing earn a reward" in line
        assert "Traceback" not in done.stderr
        run("train", tmp_path, *base, "hybrid.canary_interval=0")  # whoever wants it all the same
    newest = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None and newest.name == "step_000003"
