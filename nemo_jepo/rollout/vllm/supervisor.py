"""Keeps one vLLM server running: starts it, watches it, starts it again when it fails, and clears up after it.

    starts --/health answers--> serves --its process or its engine died, silent, or asked to--> cleared up --> starts

A server that was started again has no weights of a run; the run gives it some at its next push (see `Pool`).
"""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from types import FrameType
from typing import TextIO

from nemo_jepo.utils.processes import SharedMemory, die_with_parent, end_session, private_folder

STOP = signal.SIGUSR2
"""Ends a server that a run has started itself."""
GRACE_S = 20.0
"""Seconds that a server has to end by itself after SIGTERM."""
HEALTH_TIMEOUT_S = 5.0
MAX_SILENCES = 12
"""A server that served and whose /health does not answer in time so often in a row (a minute) is started again. Only
a process that hangs or is stopped is so silent: the engine, which may be busy for long, is another process."""
MAX_FAILED_STARTS = 3
"""A server that ends so often in a row before it serves is not started again."""
LASTING_S = 300.0
"""A server that served so long had nothing to do with the deaths before it."""
LONGEST_PAUSE_S = 60.0
WRONG_OPTION = 2
"""vLLM's exit code for a command line that it does not understand."""
_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Without the environment's http_proxy, behind which a private address is not."""


@dataclass(frozen=True, slots=True)
class End:
    """How a server ended."""

    why: str
    served_s: float
    """Seconds from its first good /health on; 0 where it never had one."""
    exit_code: int | None


def supervise(
    command: Sequence[str], environment: Mapping[str, str], url: str, parent: int | None, restarts: bool = True
) -> int:
    """Keep a server running until this process is to end; 0 then, 1 where it is not started again.

    SIGTERM and SIGINT end it. Under a parent that lives they do not: they came to the whole group, and the run still
    needs its servers to finish a step; it sends STOP when it does not.
    """
    asked = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = asked or number == STOP or os.getppid() != parent

    for number in (signal.SIGTERM, signal.SIGINT, STOP):
        signal.signal(number, stop)
    deaths = failed_starts = 0
    while not asked:
        try:
            end = serve_once(command, environment, url, lambda: asked)
        except OSError as error:  # no memory for a process, no room for a folder
            end = End(str(error), 0.0, None)
        if asked:
            return 0
        deaths = 1 if end.served_s > LASTING_S else deaths + 1
        failed_starts = 0 if end.served_s else failed_starts + 1
        hopeless = failed_starts >= MAX_FAILED_STARTS or (failed_starts and end.exit_code == WRONG_OPTION)
        again = restarts and not hopeless
        pause_s = min(2.0 ** min(deaths - 1, 10), LONGEST_PAUSE_S)
        then = f"; it is started again in {pause_s:g} s" if again else ""
        _say(f"nemo-jepo serve: the server at {url} died ({end.why}){then}", sys.stderr)
        if not again:
            return 1
        until = time.monotonic() + pause_s
        while not asked and time.monotonic() < until:
            time.sleep(0.1)
    return 0


def serve_once(command: Sequence[str], environment: Mapping[str, str], url: str, asked: Callable[[], bool]) -> End:
    """Run the server in a session of its own until it fails or this process is to end; nothing of it is left then."""
    with private_folder() as folder:
        own = {"TMPDIR": str(folder), "VLLM_RPC_BASE_PATH": str(folder)}
        # Should this process be killed, the kernel kills the server, and that its workers.
        server = subprocess.Popen(
            command, env={**environment, **own}, start_new_session=True, preexec_fn=die_with_parent
        )
        memory = SharedMemory(server.pid)
        try:
            why, served_s = watch(server, url, memory, asked)
            if asked() and server.poll() is None:
                server.terminate()
                _wait(server, GRACE_S)
            code = server.poll()
        finally:
            end_session(server.pid)
            server.wait()
            memory.remove()
    return End(why if code is None else f"exit code {code}", served_s, code)


def watch(
    server: "subprocess.Popen[bytes]", url: str, memory: SharedMemory, asked: Callable[[], bool]
) -> tuple[str, float]:
    """Until the server has ended or fails, or is to end.

    Returns:
        Why it cannot stay, empty where it has ended or is to end; seconds since its first good /health, 0 without one.
    """
    since: float | None = None
    silences, why = 0, ""
    while not why and not asked() and server.poll() is None:
        memory.look()
        health = health_of(url)
        if since is None and health == "good":
            since = time.monotonic()
            _say(f"serving {url}", sys.stdout)
        silences = silences + 1 if since is not None and health == "silent" else 0
        if since is not None and health == "dead":
            why = "/health says so"  # it would hold requests open for ever
        elif silences >= MAX_SILENCES:
            why = f"no answer from /health for {MAX_SILENCES * HEALTH_TIMEOUT_S:g} s"
        time.sleep(0.5)
    return why, 0.0 if since is None else time.monotonic() - since


def _say(line: str, stream: TextIO) -> None:
    with suppress(OSError):  # a log on a full disk ends no server
        print(line, file=stream, flush=True)


def _wait(server: "subprocess.Popen[bytes]", seconds: float) -> None:
    with suppress(subprocess.TimeoutExpired):  # it is killed next
        server.wait(seconds)


def health_of(url: str) -> str:
    """good; silent: no answer in time, or half of one; dead: nobody listens, or it says that its engine is gone."""
    try:
        with _DIRECTLY.open(f"{url}/health", timeout=HEALTH_TIMEOUT_S):
            return "good"
    except (TimeoutError, HTTPException):
        return "silent"
    except OSError as error:  # URLError is one
        return "silent" if isinstance(getattr(error, "reason", None), TimeoutError) else "dead"
