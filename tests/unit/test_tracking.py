"""The run folder after steps, resumption and sudden death; TensorBoard and NeMo's exp_manager as a run uses them."""

import io
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hydra.core.hydra_config import HydraConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nemo_jepo.config.schema import ExpManagerConfig
from nemo_jepo.tracking import SilentTracker, Tracker


def silent_settings(folder: Path) -> ExpManagerConfig:
    """No loggers."""
    return ExpManagerConfig(exp_dir=str(folder), name="run", create_tensorboard_logger=False)


def tracker_in(folder: Path) -> Tracker:
    return Tracker(folder / "run", silent_settings(folder), max_steps=10, num_samples=8)


def log_run(tracker: Tracker, steps: list[int]) -> None:
    """What a run does with its tracker."""
    with tracker:
        tracker.rewind(steps[0] - 1)
        tracker.save_config(f"first_step: {steps[0]}\n")
        for step in steps:
            tracker.log({"train_optim/surrogate_loss": 0.5 * step}, step)


def metric_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_each_step_is_one_json_object_with_its_metrics_timers_and_memory(tmp_path):
    with tracker_in(tmp_path) as tracker:
        tracker.log({"train_optim/surrogate_loss": 0.5}, step=1)
        tracker.log({"train_optim/surrogate_loss": 0.25}, step=2)
    first, second = metric_lines(tmp_path)
    assert (first["step"], first["train_optim/surrogate_loss"]) == (1, 0.5)
    assert (second["step"], second["train_optim/surrogate_loss"]) == (2, 0.25)
    assert first["memory/host_rss_gib"] == pytest.approx(psutil.Process().memory_info().rss / 2**30, rel=0.2)


def test_what_is_not_finite_becomes_null_because_json_has_no_nan(tmp_path):
    with tracker_in(tmp_path) as tracker:
        tracker.log({"a": math.nan, "b": math.inf, "c": 1.0}, step=1)
        tracker.log_rollouts(12, [{"text": "caf\u00e9", "generation_logprobs": [-1.0, -math.inf]}])
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    (record,) = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert (record["a"], record["b"], record["c"]) == (None, None, 1.0)
    (row,) = (tmp_path / "run" / "rollouts" / "step_000012.jsonl").read_text().splitlines()
    assert json.loads(row) == {"text": "caf\u00e9", "generation_logprobs": [-1.0, None]}


def test_timers_add_up_within_a_step_and_start_anew_in_the_next(tmp_path, monkeypatch):
    ticks = iter([0.0, 1.0, 10.0, 12.5, 20.0, 20.25])
    with tracker_in(tmp_path) as tracker:
        with monkeypatch.context() as patch:
            patch.setattr(time, "perf_counter", lambda: next(ticks))
            with tracker.timer("generate"):
                pass
            with pytest.raises(KeyError), tracker.timer("generate"):
                raise KeyError  # a phase that fails is timed too
            with tracker.timer("train_time"):
                pass
        tracker.log({}, step=1)
        tracker.log({}, step=2)
    first, second = metric_lines(tmp_path)
    assert (first["timers/generate"], first["timers/train_time"]) == (3.5, 0.25)
    assert not any(name.startswith("timers/") for name in second)


def test_counted_tokens_become_a_rate_over_their_own_phase(tmp_path, monkeypatch):
    ticks = iter([0.0, 4.0])
    with tracker_in(tmp_path) as tracker:
        with monkeypatch.context() as patch:
            patch.setattr(time, "perf_counter", lambda: next(ticks))
            with tracker.timer("generate"):
                pass
        tracker.count_tokens({"generate": 100, "train_time": 7})  # train_time was not timed
        tracker.log({}, step=1)
        tracker.log({}, step=2)
    first, second = metric_lines(tmp_path)
    assert first["throughput/generate_tokens_per_second"] == 25.0
    assert not any(name.startswith("throughput/train") for name in first)
    assert "throughput/generate_tokens_per_second" not in second


def test_rewind_drops_what_came_after_the_step_and_a_half_written_line(tmp_path):
    with tracker_in(tmp_path) as tracker:
        for step in range(5):
            tracker.log({"loss": float(step)}, step)
            tracker.log_rollouts(step, [{"step": step}])
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')  # as kill -9 leaves it
    with tracker_in(tmp_path) as resumed:
        resumed.rewind(2)
        resumed.log({"loss": -3.0}, step=3)
    assert [(line["step"], line["loss"]) for line in metric_lines(tmp_path)] == [
        (0, 0.0),
        (1, 1.0),
        (2, 2.0),
        (3, -3.0),
    ]
    names = sorted(path.name for path in (tmp_path / "run" / "rollouts").iterdir())
    assert names == ["step_000000.jsonl", "step_000001.jsonl", "step_000002.jsonl"]


def test_rewind_to_before_the_start_empties_the_run(tmp_path):
    with tracker_in(tmp_path) as tracker:
        tracker.rewind(-1)  # a new folder has nothing to drop
        tracker.log({}, step=0)
        tracker.rewind(-1)
    assert metric_lines(tmp_path) == []


def test_a_rewind_that_dies_leaves_every_metric(tmp_path, monkeypatch):
    with tracker_in(tmp_path) as tracker:
        tracker.log({}, step=1)
        tracker.log({}, step=2)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            tracker.rewind(1)
    assert [line["step"] for line in metric_lines(tmp_path)] == [1, 2]


def test_without_a_terminal_a_step_is_one_aligned_line(tmp_path, capsys):
    with tracker_in(tmp_path) as tracker:
        for step, bound in ((9, -3.25), (10, -12.125)):
            tracker.log({"train_rollouts/bound": bound, "train_rollouts/kl": 1e-3, "unshown": 7.0}, step)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step")]
    assert len(lines) == 2 and "-3.25" in lines[0] and "-12.12" in lines[1] and "7" not in lines[0]
    assert lines[0].index("kl") == lines[1].index("kl")


def test_on_a_terminal_a_step_moves_the_bar_and_validation_adds_a_line(tmp_path, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with tracker_in(tmp_path) as tracker:
        tracker.rewind(4)
        tracker.log({"train_rollouts/bound": -3.25}, step=5)
        tracker.log({"val_rollouts/accuracy": 0.5}, step=6)
    shown = terminal.getvalue()
    assert "4/10" in shown and "6/10" in shown and "bound -3.25" in shown
    assert "step  6/10  val accuracy 0.5" in shown and "step  5/10" not in shown


def test_every_other_rank_times_but_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with SilentTracker() as tracker:
        with tracker.timer("generate"):
            pass
        tracker.rewind(3)
        tracker.save_config("a: 1\n")
        tracker.log_rollouts(1, [{"a": 1}])
        tracker.log({"a": 1.0}, step=1)
        tracker.say("nobody hears this")
        tracker.say_once("this", "nor this")
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr() == ("", "")


def test_tensorboard_serves_a_warm_up_a_run_and_its_resumption_in_one_folder(tmp_path):
    """Three trackers in one process. The run is killed after step 2 and resumed at step 1: step 2 is logged twice."""
    settings = ExpManagerConfig(exp_dir=str(tmp_path), name="run")
    main = tmp_path / "run"
    for folder, steps in ((main / "warmup", [1]), (main, [1, 2]), (main, [2, 3])):
        log_run(Tracker(folder, settings, max_steps=3, num_samples=8, first_step=steps[0]), steps)
    assert [line["step"] for line in metric_lines(tmp_path)] == [1, 2, 3]
    assert (main / "config.yaml").read_text() == "first_step: 2\n"
    events = EventAccumulator(str(main)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train_optim/surrogate_loss")] == [
        (1, 0.5),
        (2, 1),
        (3, 1.5),
    ]
    entries = {path.name for path in main.iterdir() if not path.name.startswith("events.out.tfevents.")}
    assert entries == {"warmup", "nemo", "config.yaml", "metrics.jsonl"}


def test_every_start_is_noted_with_the_code_that_ran(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    (tmp_path / "code.py").write_text("one\n")
    git("init", "-q")
    git("add", "code.py")
    git("commit", "-q", "-m", "first")
    (tmp_path / "code.py").write_text("two\n")
    monkeypatch.chdir(tmp_path)
    for argument in ("model.seed=1", "model.seed=2"):
        monkeypatch.setattr(sys, "argv", ["nemo-jepo", "train", argument])
        tracker_in(tmp_path).close()
    nemo = tmp_path / "run" / "nemo"
    assert (nemo / "cmd-args.log").read_text() == "nemo-jepo train model.seed=1\nnemo-jepo train model.seed=2\n"
    noted = (nemo / "git-info.log").read_text()
    assert noted.count(f"commit hash: {git('rev-parse', 'HEAD')}") == 2
    assert noted.count("-one\n+two\n") == 2


def test_exp_manager_serves_wandb_for_a_warm_up_and_the_run_after_it(tmp_path, monkeypatch):
    """Two calls in one process. exp_manager would move our files away, sleep, or fail on a second call, and Lightning's
    logger would go on in the W&B run that is still open."""
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)  # of a command line that an earlier test has read
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb = {"project": "mine", "tags": ["first"]}
    settings = ExpManagerConfig(
        exp_dir=str(tmp_path),
        name="run",
        create_tensorboard_logger=False,
        create_wandb_logger=True,
        wandb_logger_kwargs=wandb,
    )
    main = tmp_path / "run"
    here = os.getcwd()
    for folder in (main / "warmup", main):
        log_run(Tracker(folder, settings, max_steps=1, num_samples=8, first_step=1), [1])
        assert len(list(folder.glob("nemo/wandb/offline-run-*/run-*.wandb"))) == 1
    assert max(slept, default=0) < 5, "as long as exp_manager lets other ranks wait"
    assert os.getcwd() == here
    assert {path.name for path in main.iterdir()} == {"warmup", "nemo", "config.yaml", "metrics.jsonl"}
    assert {path.name for path in (main / "nemo").iterdir()} >= {"cmd-args.log", "nemo_error_log.txt", "wandb"}


def test_what_was_said_about_a_thing_is_not_said_again_until_it_changes(tmp_path, capsys):
    with tracker_in(tmp_path) as tracker:
        for message in ("one", "one", "two", "one"):
            tracker.say_once("passes", message)
        tracker.say_once("rows", "one")
    assert capsys.readouterr().err.splitlines()[1:] == ["one", "two", "one", "one"]
