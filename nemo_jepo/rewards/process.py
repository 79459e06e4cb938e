"""Work on text that a model wrote, in a process of its own: one JSON line in, one JSON line out.

    parent   WorkerProcess("package.worker", cpu_limit_s=5).ask(request) -> answer, or WorkerFault
    worker   def main() -> None: serve(answer_of)        # in package/worker.py, a program and not a library

A request may cost so many seconds of its worker's CPU, user and kernel time, however busy the machine is and however
long the worker waits for its turn. The kernel keeps that time: SIGPROF at its default action ends the process, even
inside a big-integer power that never lets another Python thread run. So a request that never ends costs its limit, and
a worker at work does not outlive a dead parent. An idle one ends with its standard input.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nemo_jepo.utils.early_signals import ENDING
from nemo_jepo.utils.processes import held_back

MEMORY_LIMIT_BYTES = 4 * 2**30
"""Address space of a worker, its libraries included."""

BLOCKED_AFTER_S = 600.0
"""Wall-clock seconds after which a worker counts as blocked: one that sleeps uses no CPU time, so no limit ends it."""

ROOT = Path(__file__).parents[2]
"""Where a worker finds this package, from a checkout too."""


class WorkerFault(Exception):
    """A request without an answer, and why: its time or memory ran out, or its worker failed or ended."""


class WorkerProcess:
    """A worker that starts when first asked and again after it ended. One request at a time, one thread at a time.

    Args:
        module: the worker's program, by its full name.
        cpu_limit_s: seconds of CPU time that one request may take; starting and importing cost none of them.
        memory_limit_bytes: address space of the worker.
        blocked_after_s: see `BLOCKED_AFTER_S`.
    """

    def __init__(
        self,
        module: str,
        cpu_limit_s: float,
        memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
        blocked_after_s: float = BLOCKED_AFTER_S,
    ) -> None:
        if cpu_limit_s <= 0:
            raise ValueError(f"cpu_limit_s={cpu_limit_s} must be positive")
        self._module, self._limits = module, [str(cpu_limit_s), str(memory_limit_bytes)]
        self._blocked_after_s = blocked_after_s
        self._process: subprocess.Popen[str] | None = None

    def ask(self, request: Any) -> Any:
        """The worker's answer.

        Args:
            request: anything that JSON holds; so is the answer.
        Raises:
            WorkerFault: there is none. The next request has a fresh worker, where this one's ended.
            RuntimeError: the worker cannot start.
        """
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = self._started()
        reply = self._exchange(self._process, json.dumps(request) + "\n")
        if not reply:
            self.close()
            raise WorkerFault("the worker ended over it: its CPU time or memory ran out, or it was killed")
        answer = json.loads(reply)
        if "fault" in answer:
            raise WorkerFault(answer["fault"])
        return answer["answer"]

    def close(self) -> None:
        """End the worker. A later `ask` starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _started(self) -> "subprocess.Popen[str]":
        """A worker that has imported its libraries."""
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with held_back(ENDING):
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", self._module, *self._limits],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="ascii",
                env=os.environ | {"PYTHONPATH": path},
            )
        if not self._exchange(process, ""):
            process.communicate()
            raise RuntimeError(f"{self._module} ended with code {process.returncode} before it was ready; see above")
        return process

    def _exchange(self, process: "subprocess.Popen[str]", line: str) -> str:
        """The next line of the worker after it was sent one; "" where it ended, or was ended because it is blocked."""
        assert process.stdin is not None and process.stdout is not None
        guard = threading.Timer(self._blocked_after_s, process.kill)
        guard.daemon = True
        guard.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            return process.stdout.readline()
        except BrokenPipeError:  # it ended just now
            return ""
        finally:
            guard.cancel()


# ---- in the worker ---------------------------------------------------------------------------------------------------


def serve(answer_of: Callable[[Any], Any]) -> None:
    """Answer requests until standard input ends; the limits are the program's two arguments.

    Whatever answer_of raises, out of memory included, is a fault of that request alone; what it prints is dropped.
    """
    cpu_limit_s, memory_limit_bytes = float(sys.argv[1]), int(sys.argv[2])
    for ignored in ENDING:  # meant for the trainer, which closes our input, and held back until here
        signal.signal(ignored, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    resource.setrlimit(resource.RLIMIT_AS, (memory_limit_bytes, memory_limit_bytes))
    with _replies() as reply:
        reply("ready")
        for line in sys.stdin:
            signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)
            try:
                answer = json.dumps({"answer": answer_of(json.loads(line))})
            except Exception as error:
                answer = json.dumps({"fault": f"{type(error).__name__}: {error}"[:200]})
            signal.setitimer(signal.ITIMER_PROF, 0)
            reply(answer)


@contextmanager
def _replies() -> Iterator[Callable[[str], None]]:
    """Standard output for replies alone: whoever prints, in Python or in C, prints to nowhere."""
    with os.fdopen(os.dup(1), "w", encoding="ascii") as replies, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        yield lambda line: print(line, file=replies, flush=True)
