"""Runs that a signal ends, and what is left of them."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support import fork_server
from tests.support.command_line import ENVIRONMENT, command, true_command


def stop_when(
    condition: Callable[[], bool],
    how: signal.Signals,
    folder: Path,
    *overrides: str,
    whole_group: bool = False,
    truly: bool = False,
) -> int:
    """Start the run, send the signal as soon as the condition holds, and return the exit code.

    Args:
        whole_group: also to the run's helper processes, as Slurm and terminals do.
        truly: the installed program instead of a child of the fork server.
    """
    process = start("train", folder, *overrides, truly=truly, output=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 200
        while not condition():
            assert process.poll() is None, f"ended with {process.returncode} before the moment to stop it came"
            assert time.monotonic() < deadline, "the moment to stop it never came"
            time.sleep(0.001)
        send(process, how, whole_group)
        return process.wait(timeout=200)
    finally:
        process.kill()


def start(name: str, folder: Path, *overrides: str, truly: bool = False, output: Any) -> Any:
    """`nemo-jepo NAME` on the tiny run, leading a process group of its own; both its streams go to `output`."""
    options: dict[str, Any] = {"stdout": output, "stderr": subprocess.STDOUT, "start_new_session": True}
    if truly:
        return popen(true_command(name, folder, *overrides), **options)
    return fork_server.start(command(name, folder, *overrides), environment=ENVIRONMENT, **options)


def popen(program: list[str], **options: Any) -> "subprocess.Popen[str]":
    """A process that hears SIGINT also where this one is a shell's background job."""
    return subprocess.Popen(program, env=ENVIRONMENT, preexec_fn=_hear_ctrl_c, **options)


def _hear_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def send(process: Any, how: signal.Signals, whole_group: bool = False) -> None:
    """A signal to a process of `start`, or to all that it leads, unless it has ended."""
    if whole_group and process.poll() is None:
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)


def hears_signals(pid: int) -> bool:
    """Whether a process has taken SIGTERM into its own hands: before, as Python itself starts, it dies of one."""
    try:
        caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return False
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def num_lines(folder: Path) -> int:
    """Steps on record."""
    file = folder / "run" / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def unfinished(checkpoints: Path, step: int | None = None) -> list[Path]:
    """Checkpoints, of one step or of any, that are being written, or were when their writer was killed."""
    return list(checkpoints.glob(".step_*.partial" if step is None else f".step_{step:06d}.*.partial"))


def bits(folder: Path, step: int = 6) -> dict[str, str]:
    """Checksums of a checkpoint's tensors."""
    marker = json.loads((folder / "run" / "checkpoints" / f"step_{step:06d}" / "complete.json").read_text())
    return {name: checksum for name, checksum in marker["sha256"].items() if name.endswith(".distcp")}
