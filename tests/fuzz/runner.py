"""Runs campaigns: counts what comes of their inputs, keeps those that fail."""

import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

import nemo_jepo
from nemo_jepo.config.errors import ConfigError, DataError, RunError

CORPUS = Path(__file__).parent / "corpus"
AT_ONCE = 50
"""Inputs that Hypothesis makes knowing of each other: of many it makes ever more that resemble earlier ones."""
LONGEST_LINE = 2000
"""Characters of an error's line."""

PROGRAM = f"{Path(nemo_jepo.__file__).parent}/"
"""Where its files are; a clone of the project may have the same name."""


class TooLong(BaseException):
    """An input took longer than its limit; no Exception, so that nothing catches it."""


@dataclass(frozen=True, slots=True)
class Campaign:
    """One kind of input and what reads it."""

    inputs: SearchStrategy[Any]
    target: Callable[[Any], object]
    """Returns, or raises ConfigError, DataError or RunError."""
    share: float = 1.0
    """Of the inputs of all campaigns, relative to the others: what is slow gets less."""
    limit_s: float = 20.0
    """Seconds for one input."""
    parse: Callable[[bytes], Any] = bytes
    """Makes an input of a file of the corpus."""
    prepare: Callable[[], object] = lambda: None
    """Called once before the first input: what is slow to make, so that no input's time counts it."""


@dataclass(slots=True)
class Result:
    """What came of the inputs of a campaign."""

    tried: int = 0
    refused: int = 0
    """Ended in one line."""
    accepted: int = 0
    failures: list[str] = field(default_factory=list)
    """The traceback of each input that failed, with the file that holds it."""
    kinds: set[str] = field(default_factory=set)
    """Where and how inputs failed, once each."""


def run(name: str, campaign: Campaign, count: int, number: int, failed: Path) -> Result:
    """Try the corpus, then `count` inputs.

    Args:
        number: the seed; the same one makes the same inputs.
        failed: folder that gets the inputs that fail.
    """
    result = Result()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        campaign.prepare()
    for file in sorted(CORPUS.glob(f"{name}/*")):
        _try(name, campaign, campaign.parse(file.read_bytes()), result, failed)

    for begin in range(0, count, AT_ONCE):
        options = settings(
            max_examples=min(AT_ONCE, count - begin),
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        attempt = given(campaign.inputs)(lambda value: _try(name, campaign, value, result, failed))
        seed(f"{number} {begin}")(options(attempt))()
    return result


def _try(name: str, campaign: Campaign, value: Any, result: Result, failed: Path) -> None:
    result.tried += 1
    try:
        with time_limit(campaign.limit_s), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            campaign.target(value)
    except (ConfigError, DataError, RunError) as error:
        result.refused += 1
        if "\n" in str(error) or not str(error).isprintable() or len(str(error)) > LONGEST_LINE:
            _keep(name, value, result, failed, AssertionError(f"not one printable line: {str(error)[:300]!r}"))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        _keep(name, value, result, failed, error)
    else:
        result.accepted += 1


def _keep(name: str, value: Any, result: Result, failed: Path, error: BaseException) -> None:
    """Write a failing input into a file, and remember its traceback."""
    failed.mkdir(parents=True, exist_ok=True)
    file = failed / f"{name}_{len(result.failures):04d}"
    file.write_bytes(value if isinstance(value, bytes) else repr(value).encode("utf-8", "backslashreplace"))
    lines = traceback.format_exception(error)
    frames = [line for line in lines if PROGRAM in line]
    kind = f"{type(error).__name__} in {frames[-1].strip().splitlines()[0] if frames else 'the target'}"
    result.kinds.add(kind)
    result.failures.append(f"{file}\n{''.join(lines)}")


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TooLong in this thread after so many seconds."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLong(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    own, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, own, interval)  # of whoever limits the time of the whole, such as pytest


def run_all(campaigns: dict[str, Campaign], count: int, number: int, failed: Path) -> dict[str, Result]:
    """Every campaign with its share of `count` inputs; says on stdout how far it is."""
    total, results = sum(campaign.share for campaign in campaigns.values()), {}
    for name, campaign in campaigns.items():
        began = time.monotonic()
        results[name] = result = run(name, campaign, round(count * campaign.share / total), number, failed)
        took = time.monotonic() - began
        print(f"{name}: {result.tried} inputs in {took:.0f} s, {len(result.failures)} failed", flush=True)
    return results


def table(results: dict[str, Result]) -> str:
    """The results, a line for each campaign and one for all of them."""
    head = ("campaign", "tried", "one line", "accepted", "tracebacks")
    rows = [(name, it.tried, it.refused, it.accepted, len(it.failures)) for name, it in results.items()]
    rows.append(("all", *(sum(row[column] for row in rows) for column in range(1, 5))))  # type: ignore[misc, arg-type]
    return "\n".join(f"{row[0]:<14}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in (head, *rows))


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """What libraries write to stderr goes to /dev/null: Rust's panics do so beside what they raise."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
