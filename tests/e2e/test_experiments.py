"""Sets of real runs, what an oracle may change in one, and the commands of a set."""

import json
import os
import shlex
import signal
import time
from pathlib import Path

import pyarrow.parquet
import pytest

from tests.support import fork_server
from tests.support.command_line import ENVIRONMENT, TINY, metrics


def experiment(*arguments: str, name: str = "smoke", folder: Path) -> list[str]:
    where = f"exp_manager.exp_dir={folder}"
    return ["-c", FORKED_RUNS, "experiment", name, where, *arguments]


FORKED_RUNS = """
import subprocess, sys, types
from nemo_jepo.cli import main
from nemo_jepo.tools import experiments
from tests.support import fork_server

def start(command, env, stdin, preexec_fn, **streams):
    return fork_server.start(command[1:], environment=env, **streams)

experiments.subprocess = types.SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL)
sys.exit(main())
"""
"""`nemo-jepo experiment`, whose runs are children of the fork server; it waits for them and passes signals on to them
as to any process."""


def test_smoke_runs_is_interrupted_goes_on_and_ends_with_a_table(tmp_path):
    """A signal in its first arm, and its continuation."""
    first = tmp_path / "smoke" / "jepo" / "seed_1"
    with (tmp_path / "errors").open("w") as errors:
        process = fork_server.start(experiment(folder=tmp_path), environment=ENVIRONMENT, stderr=errors)
        while not (first / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    said = (tmp_path / "errors").read_text()
    assert code == 75 and "interrupted and saved" in said, said
    assert not (first / "finished.json").exists()

    done = fork_server.run(experiment(folder=tmp_path), environment=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "[1/3]" not in done.stderr and "[2/3] jepo, seed 1" in done.stderr and "min left)" in done.stderr
    rows = pyarrow.parquet.read_table(tmp_path / "smoke" / "results.parquet").to_pylist()
    assert {(row["arm"], row["seed"]) for row in rows} == {("jepo", 1), ("rloo", 1)}
    for arm in ("jepo", "rloo"):
        mine = {(row["step"], row["metric"]): row["value"] for row in rows if row["arm"] == arm}
        lines = (tmp_path / "smoke" / arm / "seed_1" / "metrics.jsonl").read_text().splitlines()
        logged = [json.loads(line) for line in lines]
        assert [line["step"] for line in logged] == [0, 1, 2, 3]
        for line in logged:
            for metric in ("val_rollouts/oracle_accuracy", "train_optim/surrogate_loss", "train_rollouts/bound"):
                assert mine.get((line["step"], metric)) == line.get(metric)
    at_start = {row["value"] for row in rows if row["step"] == 0 and row["metric"] == "val_rollouts/proxy_nll"}
    assert len(at_start) == 1, "the arms of a seed begin with the same weights"


LIAR = "from nemo_jepo.data import oracle as e; true = e.is_true; e.is_true = lambda *a, **k: not true(*a, **k); "


def test_an_oracle_that_lies_changes_its_own_metrics_and_no_other(tmp_path):
    """jepo_rl reads every reward there is: verifiable ones, likelihoods, the format."""
    found = []
    for folder, preparation in (("honest", ""), ("lying", LIAR)):
        where = [f"exp_manager.exp_dir={tmp_path / folder}", "exp_manager.name=run", "trainer.jepo.max_steps=2"]
        data = ["objective=jepo_rl", "data.arithmetic.answers=mixed", "data.max_answer_tokens=30"]
        script = f"{preparation}import sys; from nemo_jepo.cli import main; sys.exit(main())"
        arguments = ["-c", script, "train", *TINY, *where, *data, "trainer.jepo.val_check_interval=1"]
        done = fork_server.run(arguments, environment=ENVIRONMENT)
        assert done.returncode == 0, done.stderr
        found.append(metrics(tmp_path / folder))
    honest, lying = found
    oracle = {name for name in honest[0] if "oracle" in name}
    assert oracle == {f"val_rollouts/oracle_accuracy{part}" for part in ("", "_verifiable", "_unverifiable", "_greedy")}
    for line, other in zip(honest, lying, strict=True):
        assert {name for name in line if line[name] != other[name]} == oracle


@pytest.mark.quick
def test_commands_print_what_a_scheduler_can_start(tmp_path):
    done = fork_server.run(experiment("--commands", "--seeds", "2", folder=tmp_path), environment=ENVIRONMENT)
    shown = done.stdout.splitlines()
    assert len(shown) == 3
    assert all(shlex.split(line)[1:4] == ["-m", "nemo_jepo.cli", "train"] for line in shown)
    assert not os.listdir(tmp_path)
