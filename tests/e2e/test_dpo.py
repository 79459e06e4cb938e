"""Online, semi-online and offline DPO: `nemo-jepo train` as a whole."""

import json
import shutil
from pathlib import Path

import pytest

from nemo_jepo.checkpoint.format import step_of, whole_checkpoints
from tests.support.command_line import command, metrics, run
from tests.support.fake_judge import FakeJudge, scores
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.quick

DPO = ["objective=dpo", "trainer.jepo.max_steps=5", "trainer.jepo.save_interval=1", "trainer.jepo.keep_checkpoints=9"]
DPO += ["trainer.jepo.val_check_interval=2"]


def resumed(folder: Path, other: Path, step: int, *overrides: str) -> list[dict]:
    """The metrics of a run that goes on from one step of another run, which its checkpoints alone remember."""
    shutil.copytree(folder / "run", other / "run")
    for checkpoint in whole_checkpoints(other / "run" / "checkpoints"):
        if step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)
    run("train", other, *DPO, *overrides)
    return metrics(other)


@pytest.mark.parametrize(
    ("interval", "reference", "staleness"),
    [("2", "true", [0, 1, 0, 1, 0]), ("2", "false", [0, 1, 0, 1, 0]), ("null", "true", [0, 1, 2, 3, 4])],
)
def test_samples_are_as_old_as_the_interval_says_and_a_resumed_run_is_the_same(
    interval, reference, staleness, tmp_path
):
    overrides = [f"rollout.sync_interval={interval}", f"dpo.sync_reference={reference}"]
    run("train", tmp_path / "one", *DPO, *overrides)
    rows = metrics(tmp_path / "one")
    assert [row["train_rollouts/staleness_mean"] for row in rows] == staleness
    assert all(row["train_rollouts/pair_rate"] > 0 for row in rows)
    margins = [row["train_rollouts/pair_margin"] for row in rows]
    assert margins[0] == 0.0 and any(margins)
    assert resumed(tmp_path / "one", tmp_path / "from_3", 3, *overrides) == rows


def test_online_samples_are_the_policys_own_bit_for_bit(tmp_path):
    """s = 1 with the reference at the policy is DPO at margin 0, and samples as any on-policy run does."""
    short = ["trainer.jepo.max_steps=2", "trainer.jepo.log_rollouts=16"]
    run("train", tmp_path / "dpo", *DPO, "rollout.sync_interval=1", *short)
    run("train", tmp_path / "rloo", *DPO, "objective=rloo", *short)
    assert [row["train_rollouts/pair_margin"] for row in metrics(tmp_path / "dpo")] == [0.0, 0.0]
    assert [row["train_rollouts/staleness_mean"] for row in metrics(tmp_path / "dpo")] == [0.0, 0.0]
    first, same = (
        [
            json.loads(line)
            for line in (tmp_path / name / "run" / "rollouts" / "step_000001.jsonl").read_text().splitlines()
        ]
        for name in ("dpo", "rloo")
    )
    assert len(first) == 16
    for one, other in zip(first, same, strict=True):
        chain = one["token_ids"][: one["prompt_length"] + one["chain_length"]]
        assert chain == other["token_ids"][: len(chain)]
        assert one["generation_logprobs"] == other["generation_logprobs"][: len(one["generation_logprobs"])]
    weights = {entry["advantage"] for entry in first}
    assert weights <= {0.5, -0.5, 0.0} and 0.5 in weights and -0.5 in weights


def test_two_tensor_parallel_ranks_keep_and_save_the_samplers_weights_as_one_does(tmp_path):
    overrides = ["rollout.sync_interval=2", "trainer.jepo.max_steps=3"]
    run("train", tmp_path / "one", *DPO, *overrides)
    two = ["model.tensor_model_parallel_size=2", "trainer.devices=2"]
    run_ranks(2, command("train", tmp_path / "two", *DPO, *overrides, *two))
    one, other = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for name in ("staleness_mean", "pair_rate", "pair_margin"):
        key = f"train_rollouts/{name}"
        assert [row[key] for row in one] == pytest.approx([row[key] for row in other], rel=1e-3, abs=1e-5)


def quality(answer: str) -> float | None:
    """Longer is better, up to 9; of some lengths the judge says nothing."""
    return None if len(answer) % 7 == 3 else float(len(answer) % 10)


SCORED = ["objective=dpo", "dpo.unverifiable=score", "trainer.jepo.max_steps=2"]


def test_a_judges_scores_choose_where_nothing_is_verified_and_faults_take_no_part(tmp_path):
    """To the rule a random model is never right, so that every own answer is scored; on any split of ranks alike."""
    with FakeJudge(scores(quality)) as fake:
        judge = [f"dpo.judge.url={fake.base}"]
        run("train", tmp_path / "one", *SCORED, *judge)
        ranks = ["trainer.devices=2", "dpo.judge.cache=null"]
        run_ranks(2, command("train", tmp_path / "replicas", *SCORED, *judge, *ranks))
        run_ranks(
            2, command("train", tmp_path / "tensor", *SCORED, *judge, *ranks, "model.tensor_model_parallel_size=2")
        )
    rows = metrics(tmp_path / "one")
    for row in rows:
        asked, faulted = (row[f"train_rollouts/score_{name}_rate"] for name in ("asked", "fault"))
        assert 0 < faulted < 1 and 0 < asked <= 1
        assert row["train_rollouts/pair_rate"] > 0
        assert row["train_rollouts/chosen_reward_mean"] > row["train_rollouts/rejected_reward_mean"]
    keys = [f"train_rollouts/{name}" for name in ("pair_rate", "chosen_reward_mean", "rejected_reward_mean")]
    keys += ["train_rollouts/score_fault_rate", "train_rollouts/score_mean", "train_optim/grad_norm"]
    for split in ("replicas", "tensor"):
        for key in keys:
            assert metrics(tmp_path / split)[0][key] == pytest.approx(rows[0][key], rel=1e-5), (split, key)


def test_a_judge_that_is_down_trains_nothing_and_ends_no_run(tmp_path):
    with FakeJudge() as fake:
        pass
    run("train", tmp_path, *SCORED, f"dpo.judge.url={fake.base}", "dpo.judge.model=m", "dpo.judge.max_attempts=1")
    for row in metrics(tmp_path):
        assert row["train_rollouts/score_fault_rate"] == 1.0
        assert "train_rollouts/chosen_reward_mean" not in row and row.get("train_rollouts/pair_rate", 0.0) == 0.0
        assert row["train_optim/grad_norm"] == 0.0
