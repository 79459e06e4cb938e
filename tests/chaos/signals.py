"""SIGTERM, SIGINT and SIGUSR1 to real runs at random moments: 75 or 0, no traceback, and the same bits in the end."""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_jepo.utils.early_signals import ENDING
from nemo_jepo.utils.exit_codes import DONE, INTERRUPTED
from tests.chaos import series
from tests.chaos.rounds import Round
from tests.support.interrupted import hears_signals, send


def rounds(seed: int, number: int) -> Iterator[Round]:
    """So many signals, every second one to the installed program, which imports everything itself."""
    return series.rounds(seed, number, interrupt, judge, truly=lambda number: number % 2 == 1)


def interrupt(draw: random.Random, process: Any, folder: Path, usual_s: float) -> str:
    """From the program's first line on; half of them in the start."""
    number, whole_group = draw.choice(ENDING), draw.random() < 0.5
    delay_s = draw.uniform(0, draw.choice([usual_s / 6, usual_s]))
    while not hears_signals(process.pid):
        if process.poll() is not None:
            return f"{number.name}: not even started"
        time.sleep(0.001)
    time.sleep(delay_s)
    if process.poll() is not None:
        return ""
    send(process, number, whole_group)
    return f"{number.name} to {'all of its processes' if whole_group else 'the run'}"


def judge(code: int, said: str) -> str:
    """It has saved, or not begun, or was done already."""
    if code not in (DONE, INTERRUPTED):
        return f"exit code {code}"
    return "a traceback" if "Traceback" in said else ""
