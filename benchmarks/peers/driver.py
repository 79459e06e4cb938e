"""Worker processes that stay alive beside each other, and are asked in turn."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.peers.worker import Metrics
from benchmarks.report import Round

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Variant:
    """How one worker is started: a module of this package, its arguments, the interpreter that runs it."""

    module: str
    arguments: Sequence[str] = ()
    python: str = field(default_factory=lambda: sys.executable)


class Worker:
    """One process, held to the given cores; its stderr goes to a file.

    Raises:
        RuntimeError: it ended when it should have answered.
    """

    def __init__(self, variant: Variant, folder: Path, cores: Sequence[int], log: Path) -> None:
        command = ["taskset", "--cpu-list", ",".join(map(str, cores)), variant.python]
        command += ["-m", f"benchmarks.peers.{variant.module}", str(folder), *variant.arguments]
        threads = str(len(cores))
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                cwd=ROOT,
            )

    def answer(self) -> Metrics:
        """What it says next."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()  # its last words are written by then
            raise RuntimeError(f"{self._process.args} ended:\n{self._log.read_text()[-3000:]}")
        return json.loads(line)

    def measure(self) -> Metrics:
        """One repetition."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """It ends by itself once nobody talks to it."""
        self._process.communicate()


def rounds_of(
    variants: Mapping[str, Variant], folder: Path, cores: Sequence[int], warm_ups: int, repetitions: int
) -> list[Round]:
    """Every variant's metrics, repetition by repetition, in the order ABC, CBA, ABC, ...: neighbours share a load.

    Args:
        folder: of the workload and the models.
        cores: what each worker may run on, one thread a core.
        warm_ups: repetitions of each variant that count nowhere.
    """
    with ExitStack() as stack:
        workers = {}
        for number, (name, variant) in enumerate(variants.items()):
            workers[name] = Worker(variant, folder, cores, folder / f"{number}.log")
            stack.callback(workers[name].close)
            workers[name].answer()  # one after the other: starting takes all of a core
        for worker in workers.values():
            for _ in range(warm_ups):
                worker.measure()
        rounds = []
        for repetition in range(repetitions):
            order = list(workers)[:: -1 if repetition % 2 else 1]
            found = {name: workers[name].measure() for name in order}
            rounds.append({name: found[name] for name in workers})
    return rounds
