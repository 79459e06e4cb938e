"""What a run leaves behind, and whom to kill: vLLM's processes under a process, files in /dev/shm."""

import importlib.util
import re
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make vllm")

# vLLM's attention on a CPU refuses heads under 32 channels.
SHAPE = ["model.hf_config.hidden_size=64", "model.hf_config.num_attention_heads=2"]
SHAPE += ["model.hf_config.num_key_value_heads=2"]


def orphaned_memory() -> set[str]:
    """Files in /dev/shm that no living process maps.

    loky's semaphores are mapped under a name that is gone; their own names bear the id of their process.
    """
    mapped: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = maps.read_text().splitlines()
        except OSError:
            continue
        mapped |= {Path(line.split(maxsplit=5)[5]).name for line in lines if " /dev/shm/" in line}
    left = {file.name for file in Path("/dev/shm").iterdir()} - mapped
    return {name for name in left if not any(psutil.pid_exists(int(pid)) for pid in re.findall(r"-(\d+)-", name))}


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def named(pid: int, part: str) -> list[psutil.Process]:
    """Descendants whose name or command line holds the part: api_server, EngineCor, Worker."""
    found = []
    for process in descendants(pid):
        try:
            if part in process.name() or part in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def wait_until(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
