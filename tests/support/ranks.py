"""Whole programs on several ranks: children of the fork server, or processes of their own where they need a GPU."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from nemo_jepo.utils.network import free_ports
from tests.support import fork_server

ROOT = Path(__file__).parents[2]


def place_of(rank: int, world_size: int, port: int) -> dict[str, str]:
    """torchrun's variables."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in place.items()}


@contextmanager
def started(
    world_size: int, command: list[str], environment: Mapping[str, str] | None = None, forked: bool = True
) -> Iterator[list[tuple[Any, IO[str]]]]:
    """`python *command` once a rank, with torchrun's variables set: (process, its output), by rank; killed at the end.

    Args:
        environment: variables beside those of this process.
        forked: in children of the fork server, which have no GPU.
    """
    (port,) = free_ports()
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    shared = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    shared |= environment or {}
    with ExitStack() as stack:
        ranks: list[tuple[Any, IO[str]]] = []
        for rank in range(world_size):
            file = stack.enter_context(tempfile.TemporaryFile("w+"))
            own = shared | place_of(rank, world_size, port)
            process: Any
            if forked:
                process = fork_server.start(command, environment=own, stdout=file, stderr=subprocess.STDOUT)
            else:
                process = subprocess.Popen([sys.executable, *command], env=own, stdout=file, stderr=subprocess.STDOUT)
            stack.callback(process.wait)
            stack.callback(process.kill)
            ranks.append((process, file))
        yield ranks


def output_of(file: IO[str]) -> str:
    """What a rank has written so far."""
    file.seek(0)
    return file.read()


def run_ranks(
    world_size: int,
    command: list[str],
    timeout: float = 240,
    environment: Mapping[str, str] | None = None,
    forked: bool = True,
) -> str:
    """Run `python *command` once a rank, with torchrun's variables set; the output of all ranks if all end well.

    Args:
        environment: variables beside those of this process.
        forked: in children of the fork server, which have no GPU.
    """
    with started(world_size, command, environment, forked) as ranks:
        deadline = time.monotonic() + timeout
        while any(process.poll() is None for process, _ in ranks):
            if any(process.returncode for process, _ in ranks) or time.monotonic() > deadline:
                break  # the others would wait for the dead one
            time.sleep(0.05)
        for process, _ in ranks:
            process.kill()
            process.wait()
        outputs = [output_of(file) for _, file in ranks]
    failed = [
        f"rank {rank} ended with {process.returncode}:\n{output[-4000:]}"
        for rank, ((process, _), output) in enumerate(zip(ranks, outputs, strict=True))
        if process.returncode
    ]
    assert not failed, "\n".join(failed)
    return "\n".join(outputs)
