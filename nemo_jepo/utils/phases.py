"""Which part of its work this process is in, for whoever watches that the run goes on.

    with phases.phase("generate"): ...      a tracker's timers are the phases; between two of them is a phase as well

A phase is a stretch between two changes: a timer inside another one ends the outer's stretch and begins a new one.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

OUTSIDE = "before or after training"
"""Model and data are loaded, servers start and end; the phase of a process that has entered no other."""
ALONE = "work of one rank"
"""The other ranks wait, for a download or a judge perhaps, and nobody can say how long."""
WITHOUT_USUAL = (OUTSIDE, ALONE, "save_time")
"""What took seconds the last time may take minutes the next: start, end and file systems."""


@dataclass(frozen=True, slots=True)
class Phase:
    """One stretch of work."""

    name: str
    number: int
    """How many came before it: the same on every rank, since every rank has the same timers."""
    usual_s: float | None
    """Seconds of the longest one of this name in this run; None where there was none, or where it says nothing."""


def current() -> Phase:
    """The phase that the main thread is in."""
    return _current


@contextmanager
def phase(name: str) -> Iterator[None]:
    """What is inside is this phase; the one around it goes on afterwards."""
    _names.append(name)
    _begin(name)
    try:
        yield
    finally:
        _names.pop()
        _begin(_names[-1] if _names else f"after {name}")


def leave_training() -> None:
    """The run has ended; another one of this process begins without usual times."""
    _begin(OUTSIDE)
    _longest.clear()


_longest: dict[str, float] = {}
_names: list[str] = []
_since = time.monotonic()
_current = Phase(OUTSIDE, 0, None)


def _begin(name: str) -> None:
    global _current, _since
    now, before = time.monotonic(), _current
    _longest[before.name] = max(_longest.get(before.name, 0.0), now - _since)
    _since = now
    _current = Phase(name, before.number + 1, None if name in WITHOUT_USUAL else _longest.get(name))
