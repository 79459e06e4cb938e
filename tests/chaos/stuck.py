"""A rank of two is stopped at a random moment: it is named, the run ends, and its next start ends with equal bits."""

import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from nemo_jepo.utils.exit_codes import FAILED
from tests.chaos import series
from tests.chaos.rounds import Round
from tests.support.command_line import command, metrics
from tests.support.interrupted import bits
from tests.support.ranks import output_of, run_ranks, started

SETTINGS = (*series.SETTINGS, "trainer.devices=2")


def rounds(seed: int, number: int) -> Iterator[Round]:
    """So many stopped ranks, each of a run of its own."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="nemo-jepo-chaos-") as place:
        whole = Path(place) / "whole"
        run_ranks(2, command("train", whole, *SETTINGS), timeout=series.PATIENCE_S)
        for index in range(number):
            began, folder, stopped = time.monotonic(), Path(place) / f"run_{index}", draw.randint(0, 1)
            problems = stop(draw, folder, stopped)
            try:
                run_ranks(2, command("train", folder, *SETTINGS), timeout=series.PATIENCE_S)
                problem = series.difference(folder, metrics(whole), bits(whole, series.STEPS))
            except AssertionError as error:
                problem = f"the next start: {error}"
            problems += [problem] if problem else []
            yield Round(f"rank {stopped} of 2 stopped", time.monotonic() - began, problems)


def stop(draw: random.Random, folder: Path, stopped: int) -> list[str]:
    """Stop a rank of the run some time after its first steps; what was wrong with what followed."""
    last_line, delay_s = draw.randint(1, series.STEPS - 2), draw.uniform(0, 0.5)
    with started(2, command("train", folder, *SETTINGS, "trainer.stuck_timeout_s=10")) as ranks:
        (victim, _), (other, written) = ranks[stopped], ranks[1 - stopped]
        lines = folder / "run" / "metrics.jsonl"
        while not lines.exists() or lines.read_text().count("\n") < last_line:
            if other.poll() is not None:
                return [f"ended before it could be stopped:\n{output_of(written)[-2000:]}"]
            time.sleep(0.01)
        time.sleep(delay_s)
        os.kill(victim.pid, signal.SIGSTOP)
        code, said = other.wait(timeout=series.PATIENCE_S), output_of(written)
    problems = [f"exit code {code}"] if code != FAILED else []
    if f"rank {stopped} (host " not in said or f"pid {victim.pid}) is stuck" not in said:
        problems.append(f"not named:\n{said[-2000:]}")
    return problems
