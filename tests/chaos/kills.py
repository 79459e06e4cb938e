"""kill -9 of real runs at random moments: started again, each ends with the same bits."""

import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nemo_jepo.utils.exit_codes import DONE
from tests.chaos import series
from tests.chaos.rounds import Round
from tests.support.interrupted import unfinished


def rounds(seed: int, number: int) -> Iterator[Round]:
    """So many kills."""
    return series.rounds(seed, number, kill, judge, truly=lambda _: False)


def kill(draw: random.Random, process: Any, folder: Path, usual_s: float) -> str:
    """At any time; or in what is short and would seldom be hit: a save, a validation, the start."""
    kind = draw.choice(["at any time", "at any time", "in a save", "in a validation", "in the start"])
    checkpoints = folder / "run" / "checkpoints"
    before, validations = set(unfinished(checkpoints)), 3 * draw.randint(1, series.STEPS // 3)
    sampled = folder / "run" / "rollouts" / f"step_{validations:06d}.jsonl"
    was_sampled = sampled.exists()
    moments: dict[str, tuple[Callable[[], bool], float]] = {
        "at any time": (lambda: True, usual_s),
        "in a save": (lambda: bool(set(unfinished(checkpoints)) - before), 0.1),
        "in a validation": (lambda: sampled.exists() and not was_sampled, 0.2),
        "in the start": (lambda: True, usual_s / 6),
    }
    came, longest_s = moments[kind]
    while not came():
        if process.poll() is not None:
            return ""
        time.sleep(0.001)
    time.sleep(draw.uniform(0, longest_s))
    if process.poll() is not None:
        return ""
    process.kill()
    return f"killed {kind}"


def judge(code: int, said: str) -> str:
    """What it has written says nothing: background writers of a killed run may complain that it is gone."""
    return "" if code in (-signal.SIGKILL, DONE) else f"exit code {code}"
