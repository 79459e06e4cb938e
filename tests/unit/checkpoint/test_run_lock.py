"""A folder's lock: who holds it is said, who is gone does not keep it; two locks of one process exclude each other."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_jepo.checkpoint import run_lock
from nemo_jepo.checkpoint.run_lock import LOCK, _Lock
from nemo_jepo.config.errors import ConfigError


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(run_lock, "SILENT_S", 0.2)
    monkeypatch.setattr(run_lock, "HANDOVER_S", 0.2)
    monkeypatch.setattr(run_lock, "BEAT_S", 0.02)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def taken(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        _Lock(folder)
    return str(caught.value)


def test_the_second_run_is_told_who_is_at_work_and_the_third_finds_the_folder_free(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    first = _Lock(tmp_path / "run")
    monkeypatch.setenv("SLURM_JOB_ID", "4712")
    line = taken(tmp_path / "run")
    who = f"process {os.getpid()} on {socket.gethostname()}, Slurm job 4711, since "
    rule = f"another run is at work in this folder: {who}"
    assert line.startswith(f"exp_manager.name='{tmp_path / 'run'}': {rule}")
    assert line.endswith(". Wait for it, stop it, or choose another exp_manager.name.")
    first.release()
    assert (tmp_path / "run" / LOCK).read_text() == ""
    _Lock(tmp_path / "run").release()


def test_a_job_that_slurm_starts_again_waits_for_its_former_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    first = _Lock(tmp_path)
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        first.release()

    monkeypatch.setattr(run_lock.time, "sleep", pause)
    _Lock(tmp_path).release()
    assert len(pauses) == 1


def held_by(folder: Path, **who: object) -> None:
    """The file as a holder left it whom the kernel no longer knows."""
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps(who))


def test_who_was_killed_on_this_node_does_not_keep_it(tmp_path):
    held_by(tmp_path, host=socket.gethostname(), pid=os.getpid(), started=0.0)
    _Lock(tmp_path).release()


def test_who_is_gone_on_another_node_does_not_keep_it(tmp_path):
    held_by(tmp_path, host="node17", pid=1, since="then")
    _Lock(tmp_path).release()


def test_who_is_at_work_on_another_node_keeps_it_where_the_kernel_does_not_know(tmp_path, monkeypatch):
    held_by(tmp_path, host="node17", pid=1, since="then")
    monkeypatch.setattr(run_lock.time, "sleep", lambda _: os.utime(tmp_path / LOCK))
    assert "process 1 on node17, since then" in taken(tmp_path)


def test_a_job_that_slurm_starts_again_on_another_node_begins_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    held_by(tmp_path, host="node17", pid=1, job="4711")
    monkeypatch.setattr(run_lock.time, "sleep", lambda _: pytest.fail("it waits"))
    _Lock(tmp_path).release()


@pytest.fixture
def no_locks(monkeypatch):
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


def test_without_locks_of_the_file_system_a_living_holder_keeps_it_and_a_dead_one_does_not(tmp_path, no_locks):
    first = _Lock(tmp_path)
    assert f"process {os.getpid()} on" in taken(tmp_path)
    first.release()
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    held_by(tmp_path, host=socket.gethostname(), pid=dead.pid, started=1.0)
    _Lock(tmp_path).release()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 5000, '{"host": 3, "pid": "x"}', "\0" * 10])
def test_a_file_that_says_nothing_keeps_nobody_out(text, tmp_path):
    (tmp_path / LOCK).write_text(text)
    _Lock(tmp_path).release()


def test_a_forked_child_does_not_keep_it(tmp_path):
    """A background writer outlives a killed run for a moment."""
    first = _Lock(tmp_path)
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    os.close(first._descriptor)  # as the kernel does it for a killed process
    run_lock._held.discard(first._descriptor)
    second = _Lock(tmp_path)
    os.write(go[1], b"x")
    os.waitpid(child, 0)
    second.release()
    first._done.set()


@pytest.mark.parametrize("kind", ["a file", "no permission", "too long", "a link"])
def test_a_folder_that_cannot_be_written_is_one_line(kind, tmp_path, monkeypatch):
    folder = {"a file": tmp_path / "file" / "run", "too long": tmp_path / ("x" * 300)}.get(kind, tmp_path / "run")
    (tmp_path / "file").write_text("")
    if kind == "no permission":

        def refused(*_: object, **__: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "mkdir", refused)
    if kind == "a link":
        folder.mkdir()
        (folder / LOCK).symlink_to(tmp_path / "elsewhere")
    line = taken(folder)
    assert line.startswith(f"exp_manager.exp_dir='{tmp_path}/") and "': the run's folder cannot be written (" in line
    assert "\n" not in line and not (tmp_path / "elsewhere").exists()
