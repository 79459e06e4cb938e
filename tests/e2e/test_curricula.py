"""Curricula through the command line: stages one after another, and orders of prompts that follow what was learnt."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import command, metrics, run
from tests.support.interrupted import bits, num_lines, stop_when
from tests.support.ranks import run_ranks

STAGES = [
    # The first ends by its metric after 2 of 5 steps: no model of the tiny run is ever right.
    "stages=[{max_steps: 5, until: {metric: val_rollouts/accuracy, at_most: 0.0}, overrides: {rollout.max_tokens: 20, "
    "trainer.jepo.val_check_interval: 2}}, {max_steps: 2, overrides: {data.arithmetic.num_steps: 2}}]",
    "trainer.jepo.max_steps=2",
    "trainer.jepo.save_interval=1",
    "trainer.jepo.val_check_interval=0",
]


def of_stage(folder: Path, number: int) -> list[dict[str, Any]]:
    """Its metrics; `metrics` and `bits` read <folder>/run."""
    (folder / f"{number}").mkdir(exist_ok=True)
    link = folder / f"{number}" / "run"
    if not link.exists():
        link.symlink_to(folder / "run" / f"stage_{number}")
    return metrics(folder / f"{number}")


def test_stages_killed_on_their_way_end_as_if_never_interrupted(tmp_path):
    """Killed as the second begins, and in the main run's first step; an evaluation in between takes the stage."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run("train", whole, *STAGES)
    assert [line["step"] for line in of_stage(whole, 1)] == [1, 2]
    assert [line["step"] for line in of_stage(whole, 2)] == [1, 2]
    assert [line["step"] for line in metrics(whole)] == [1, 2]
    assert max(line["train_rollouts/response_tokens_mean"] for line in of_stage(whole, 1)) <= 20
    assert max(line["train_rollouts/response_tokens_mean"] for line in metrics(whole)) > 20

    second = killed / "run" / "stage_2" / "config.yaml"
    assert stop_when(second.exists, signal.SIGKILL, killed, *STAGES) == -signal.SIGKILL
    assert not (second.parent / "checkpoints" / "latest").exists()
    found = json.loads(run("evaluate", killed, *STAGES).stdout.splitlines()[-1])
    assert found["model"].endswith("run/stage_1/checkpoints/step_000002")
    main = killed / "run" / "config.yaml"
    assert stop_when(main.exists, signal.SIGKILL, killed, *STAGES) == -signal.SIGKILL
    run("train", killed, *STAGES)
    for number in (1, 2):
        assert of_stage(killed, number) == of_stage(whole, number)
        assert bits(killed / f"{number}", 2) == bits(whole / f"{number}", 2)
    assert metrics(killed) == metrics(whole)
    assert bits(killed, 2) == bits(whole, 2)


def test_a_run_that_its_metric_ends_is_known_as_ended_also_after_an_interrupted_validation(tmp_path):
    """Told to stop in the validation of step 3, the next start validates it, and makes no step more."""
    settings = ["data.num_validation_prompts=40", "data.arithmetic.num_validation=40", "rollout.batch_size=4"]
    until = ["trainer.jepo.until.metric=val_rollouts/accuracy", "trainer.jepo.until.at_most=0"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run("train", whole, *settings, *until)
    assert num_lines(whole) == 3
    sampled = stopped / "run" / "rollouts" / "step_000003.jsonl"
    assert stop_when(sampled.exists, signal.SIGTERM, stopped, *settings, *until) == 75
    assert num_lines(stopped) == 2
    for _ in range(2):
        run("train", stopped, *settings, *until)
        assert metrics(stopped) == metrics(whole)
    run("train", stopped, *settings, "trainer.jepo.max_steps=4")  # without the bound it goes on
    assert num_lines(stopped) == 4


@pytest.mark.parametrize(
    ("order", "metric"),
    [("data.drop_easy=0.0018", "prompts_left"), ("data.sampler=learning_progress", "sampler_effective_prompts")],
)
def test_an_order_that_learns_is_the_same_in_every_layout_and_after_a_resume(order, metric, tmp_path):
    """Two steps on two replicas and two more on one read the prompts that four on one read."""
    settings = [order, "data.arithmetic.num_train=10", "trainer.jepo.val_check_interval=0", "trainer.jepo.max_steps=4"]
    run("train", tmp_path / "one", *settings)
    run_ranks(2, command("train", tmp_path / "two", *settings, "trainer.devices=2", "trainer.jepo.max_steps=2"))
    run("train", tmp_path / "two", *settings)
    lines = metrics(tmp_path / "one")
    assert len({line[f"train_rollouts/{metric}"] for line in lines}) > 1
    for line, expected in zip(metrics(tmp_path / "two"), lines, strict=True):
        assert line[f"train_rollouts/{metric}"] == pytest.approx(expected[f"train_rollouts/{metric}"], rel=1e-3)
        assert line["train_rollouts/bound"] == pytest.approx(expected["train_rollouts/bound"], rel=2e-3)
    for step in (2, 4):
        used = [
            [
                json.loads(row)["prompt_id"]
                for row in (tmp_path / name / "run" / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()
            ]
            for name in ("one", "two")
        ]
        assert used[0] == used[1]
