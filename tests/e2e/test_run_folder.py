"""One run, one folder: the second start is told of the first, a killed one keeps nobody out, nothing is begun anew."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import fork_server
from tests.support.command_line import ENVIRONMENT, command, metrics, run


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    run("train", folder)
    return folder


@pytest.fixture
def again(finished, tmp_path) -> Path:
    """A copy of the finished run, which would go on for more steps."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path


def test_a_second_start_is_told_of_the_first_and_changes_nothing(tmp_path):
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    long = "trainer.jepo.max_steps=1000"
    first = fork_server.start(command("train", tmp_path, long), environment=ENVIRONMENT, **quiet)
    try:
        file, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 100
        while not (file.exists() and file.read_text().count("\n") >= 2):
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)
        before = file.read_text()
        second = run("train", tmp_path, long, expect=2)
        assert file.read_text() == before
        assert f"another run is at work in this folder: process {first.pid} on {os.uname().nodename}" in second.stderr
        assert "Traceback" not in second.stderr
    finally:
        first.kill()
        first.wait()
    steps = len(metrics(tmp_path))
    run("train", tmp_path, f"trainer.jepo.max_steps={steps + 1}")
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, steps + 2))


def test_a_run_whose_checkpoints_are_all_broken_says_so_and_trains_nothing(again):
    checkpoints = again / "run" / "checkpoints"
    for path in checkpoints.glob("step_*"):
        (path / "complete.json").unlink()
    before = (again / "run" / "metrics.jsonl").read_text()
    for name in ("train", "evaluate"):
        ended = run(name, again, expect=2)
        assert "none is whole: step_" in ended.stderr and "Traceback" not in ended.stderr
    assert (again / "run" / "metrics.jsonl").read_text() == before


def test_a_newer_broken_checkpoint_is_named_and_what_killed_runs_left_is_removed(again):
    checkpoints = again / "run" / "checkpoints"
    newest = max(checkpoints.glob("step_*"))
    (newest / "complete.json").unlink()
    rest = checkpoints / ".step_000099.0a1b2c3d.deleted"
    rest.mkdir()
    ended = run("train", again)
    assert f"{newest} is passed over, although it is the newer one: has no complete.json" in ended.stderr
    assert f"removed {rest}, which a killed run left" in ended.stderr and not rest.exists()
    assert (newest / "complete.json").exists()


def test_a_damaged_file_is_named_by_every_command_that_loads_it(again):
    newest = max((again / "run" / "checkpoints").glob("step_*"))
    file = max(newest.glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    from_it = [f"pretrained_checkpoint.restore_from_path={newest}", "model.hf_config=null", "exp_manager.name=other"]
    export = ["-m", "nemo_jepo.cli", "export", str(newest), str(again / "exported"), "checkpoint.verify_on_load=all"]
    for ended in (
        run("train", again, "trainer.jepo.max_steps=1000", expect=2),
        run("evaluate", again, "checkpoint.verify_on_load=all", expect=2),
        run("train", again, *from_it, "checkpoint.verify_on_load=all", expect=2),
        fork_server.run(export, environment=ENVIRONMENT),
    ):
        assert ended.returncode == 2, ended.stderr
        assert f"{file.name} holds other bytes than when it was written (sha256)" in ended.stderr
        assert "Traceback" not in ended.stderr
    assert not (again / "exported").exists()
