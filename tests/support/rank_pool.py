"""Ranks that stay: one set of processes for each world size and session, which run functions one after another.

    losses = on_ranks(2, module.function, argument, ...)       what the function returned, by rank

A job is a function at the top of a module and arguments that pickle. It finds torch.distributed initialised as a run
does it (gloo over loopback without CUDA), seeds its own layout with parallel.init_model_parallel, and leaves nothing:
process groups, random states, environment and working directory are as before when it has ended. A job that raises is
an AssertionError with its traceback; one that hangs is killed. After either, and after 20 jobs, the next job gets new
processes, children of the fork server, in less than a second.

Job modules import no pytest, so that a process on a GPU can run them without it.
"""

import contextlib
import gc
import os
import pickle
import random
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from nemo_jepo.utils.network import free_ports
from tests.support import fork_server
from tests.support.ranks import ROOT, place_of

JOBS_OF_A_RANK = 20
"""Then come new ones: gloo keeps threads of the groups of each job, and they wake a hundred times a second."""
WORKER = "from tests.support.rank_pool import work; work()"


def on_ranks(world_size: int, job: Callable[..., Any], *arguments: Any, timeout: float = 240) -> list[Any]:
    """Run job(*arguments) on every rank of the session's pool of this size; what they returned, by rank."""
    pool = _pools.setdefault(world_size, RankPool(world_size))
    return pool.run(job, *arguments, timeout=timeout)


def close_pools() -> None:
    """End the session's ranks; the next job would get new ones."""
    for pool in _pools.values():
        pool.close()


_pools: dict[int, "RankPool"] = {}


class RankPool:
    """Processes of one world size.

    Args:
        environment: variables beside those of this process.
        forked: children of the fork server; else processes of their own, which may use a GPU.
    """

    def __init__(self, world_size: int, environment: Mapping[str, str] | None = None, forked: bool = True) -> None:
        self._world_size, self._environment, self._forked = world_size, dict(environment or {}), forked
        self._ranks: list[_Rank] = []
        self._num_jobs = 0

    def run(self, job: Callable[..., Any], *arguments: Any, timeout: float = 240) -> list[Any]:
        """What job(*arguments) returned on every rank.

        Raises:
            AssertionError: a rank raised, died or did not answer in time.
        """
        message = pickle.dumps((job, arguments))
        if self._num_jobs == JOBS_OF_A_RANK:
            self.close()
        self._num_jobs += 1
        if not self._ranks:
            (port,) = free_ports()
            self._ranks = [self._start(rank, port) for rank in range(self._world_size)]
        try:
            for rank in self._ranks:
                rank.connection.send_bytes(message)
            answers = self._answers(time.monotonic() + timeout)
        except BaseException:
            self.close()
            raise
        failed = [
            f"{job.__module__}.{job.__qualname__} on rank {number} of {self._world_size} {text}"
            for number, (succeeded, text) in enumerate(answers)
            if not succeeded
        ]
        if failed:
            self.close()
        assert not failed, "\n".join(failed)
        return [value for _, value in answers]

    def _answers(self, deadline: float) -> list[tuple[bool, Any]]:
        """(True, value) or (False, what went wrong) by rank; others than the first to fail have two seconds more."""
        answers: dict[Connection, tuple[bool, Any]] = {}
        connections = [rank.connection for rank in self._ranks]
        while waiting := [connection for connection in connections if connection not in answers]:
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            for connection in ready:
                rank = self._ranks[connections.index(connection)]
                answers[connection] = rank.answer()
                if not answers[connection][0]:
                    deadline = min(deadline, time.monotonic() + 2)
            if not ready:
                answers |= {connection: (False, "gave no answer and was killed") for connection in waiting}
        return [answers[connection] for connection in connections]

    def _start(self, rank: int, port: int) -> "_Rank":
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
        environment |= self._environment | place_of(rank, self._world_size, port)
        ours, theirs = socket.socketpair()
        log = Path(os.environ[fork_server.FOLDER]) / f"rank_{os.getpid()}_{self._world_size}_{rank}_{port}.log"
        process: Any
        with theirs, log.open("w") as output:
            if self._forked:
                process = fork_server.start(
                    ["-c", WORKER], environment=environment, stdin=theirs.fileno(), stdout=output, stderr=output
                )
            else:
                process = subprocess.Popen(
                    [sys.executable, "-c", WORKER], env=environment, stdin=theirs, stdout=output, stderr=output
                )
        return _Rank(process, Connection(ours.detach()), log)

    def close(self) -> None:
        """End the processes, whatever they do."""
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.process.wait()
            rank.connection.close()
        self._ranks, self._num_jobs = [], 0

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Rank:
    def __init__(self, process: Any, connection: Connection, log: Path) -> None:
        self.process, self.connection, self.log = process, connection, log

    def answer(self) -> tuple[bool, Any]:
        try:
            return pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionError):
            return False, f"ended with {self.process.wait()}:\n{self.log.read_text()[-4000:]}"


# ---- in a rank -----------------------------------------------------------------------------------------------------


def work() -> None:
    """Run what comes through standard input, until it closes."""
    import torch
    import torch.distributed as dist

    from nemo_jepo.actor import parallel

    connection = Connection(os.dup(0))
    torch.set_num_threads(1)
    parallel.init_distributed()
    environment, folder = dict(os.environ), os.getcwd()
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            dist.destroy_process_group()
            return
        _forget(environment, folder)
        try:
            job, arguments = pickle.loads(message)
            answer = pickle.dumps((True, job(*arguments)))
            del job, arguments
            dist.barrier()
            _destroy_groups()
        except BaseException:
            answer = pickle.dumps((False, f"raised\n{traceback.format_exc()}"))
        with contextlib.suppress(BrokenPipeError):
            connection.send_bytes(answer)


def _forget(environment: Mapping[str, str], folder: str) -> None:
    """What the next job must not inherit, beside process groups."""
    import numpy
    import torch

    gc.collect()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)


def _destroy_groups() -> None:
    """Every process group but the world; gloo keeps threads and connections for each."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from nemo_jepo.actor import parallel

    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state._global_process_group_list = None
    parallel._replica_group = None
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
