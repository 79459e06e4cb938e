"""A worker's side of the talk with the driver: "go" on stdin, one line of JSON on stdout. Standard library alone."""

import json
import os
import resource
import sys
import time
from collections.abc import Callable

Metrics = dict[str, float]


class Channel:
    """The worker's stdout; from now on what libraries print goes to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, metrics: Metrics) -> None:
        """One line to the driver."""
        print(json.dumps(metrics), file=self._out, flush=True)

    def told_to_go(self) -> bool:
        """Wait for the driver; False where it has gone or wants no more."""
        return sys.stdin.readline().strip() == "go"

    def serve(self, work: Callable[[], Metrics]) -> None:
        """Measure the work every time the driver says so; its own metrics are sent along."""
        self.say({})
        while self.told_to_go():
            watch = Stopwatch()
            found = work()
            self.say(watch.stop() | found)


class Stopwatch:
    """Runs from its making to `stop`."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self) -> Metrics:
        """Seconds on the clock, seconds of processor time of all threads, most bytes that the process ever held."""
        return {
            "seconds": time.perf_counter() - self._wall,
            "cpu_seconds": time.process_time() - self._cpu,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
