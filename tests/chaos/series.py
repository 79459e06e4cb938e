"""One run that is disturbed several times and then left in peace, and its comparison with one that never was."""

import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.chaos.rounds import Round
from tests.support.command_line import metrics
from tests.support.interrupted import bits, start

STEPS = 12
SETTINGS = (
    f"trainer.jepo.max_steps={STEPS}",
    "trainer.jepo.num_prompts_per_step=2",
    "trainer.jepo.num_generations_per_prompt=2",
    "trainer.jepo.val_check_interval=3",
    "trainer.jepo.save_interval=2",
    "rollout.max_tokens=20",
    "data.num_validation_prompts=2",
    "data.arithmetic.num_validation=2",
    "evaluation.num_generations_per_prompt=2",
)
"""The tiny run, made smaller: a start is a second of one core, a step a third of one."""
IN_A_SERIES = 5
"""Disturbances of one run before it may end."""
PATIENCE_S = 600.0

Disturb = Callable[[random.Random, Any, Path, float], str]
"""Waits for its moment, sends its signal, and says what that was; "" where the run ended before. Arguments: what draws
the moment, the process, the folder, and the seconds that an undisturbed run takes."""
Judge = Callable[[int, str], str]
"""What is wrong with an exit code and what the process has written; "" for nothing."""


def rounds(seed: int, number: int, disturb: Disturb, judge: Judge, truly: Callable[[int], bool]) -> Iterator[Round]:
    """So many disturbances, a few for each run; those of one run share what was wrong with its end.

    Args:
        truly: whether the run of this disturbance is the installed program, not a child of the fork server.
    """
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="nemo-jepo-chaos-") as place:
        whole, usual_s = Path(place) / "whole", 0.0
        for _ in range(2):  # the first one also starts the fork server
            began = time.monotonic()
            problem = finish(whole, ())
            usual_s = time.monotonic() - began
            assert not problem, problem
            assert any(line["train_optim/grad_norm"] > 0 for line in metrics(whole)), "it learns nothing"
            metrics_of_whole, bits_of_whole = metrics(whole), bits(whole, STEPS)
            remove(whole)
        done = 0
        while done < number:
            folder = Path(place) / f"run_{done}"
            saving = f"trainer.jepo.async_save={str(draw.random() < 0.5).lower()}"
            series: list[Round] = []
            for _ in range(min(IN_A_SERIES, number - done)):
                began = time.monotonic()
                kind, problem = disturbed(draw, folder, (saving,), disturb, judge, truly(done + len(series)), usual_s)
                if not kind:
                    break
                series.append(Round(kind, time.monotonic() - began, [problem] if problem else []))
            began = time.monotonic()
            wrong = finish(folder, (saving,)) or difference(folder, metrics_of_whole, bits_of_whole)
            if wrong:
                kept = Path(tempfile.mkdtemp(prefix="nemo-jepo-chaos-broken-")) / "run"
                folder.rename(kept)
                wrong = f"{wrong} ({saving}; {', '.join(r.kind for r in series)}; kept in {kept})"
            each = (time.monotonic() - began) / max(len(series), 1)
            for one in series:
                yield Round(one.kind, one.seconds + each, one.problems + ([wrong] if wrong else []))
            done += len(series)
            remove(folder)


def disturbed(
    draw: random.Random,
    folder: Path,
    overrides: tuple[str, ...],
    disturb: Disturb,
    judge: Judge,
    truly: bool,
    usual_s: float,
) -> tuple[str, str]:
    """What was done to one start of the run, and what was wrong with its end."""
    with tempfile.TemporaryFile("w+") as output:
        process = start("train", folder, *SETTINGS, *overrides, truly=truly, output=output)
        try:
            kind = disturb(draw, process, folder, usual_s)
            code = process.wait(timeout=PATIENCE_S)
        finally:
            process.kill()
        output.seek(0)
        said = output.read()
    problem = judge(code, said) if kind or code else ""
    return kind, f"{kind}: {problem}\n{said[-2000:]}" if problem else ""


def finish(folder: Path, overrides: tuple[str, ...]) -> str:
    """Let the run end; what was wrong with that."""
    with tempfile.TemporaryFile("w+") as output:
        process = start("train", folder, *SETTINGS, *overrides, output=output)
        code = process.wait(timeout=PATIENCE_S)
        output.seek(0)
        said = output.read()
    return "" if code == 0 and "Traceback" not in said else f"the last start ended with {code}:\n{said[-2000:]}"


def difference(folder: Path, metrics_of_whole: list[dict], bits_of_whole: dict[str, str]) -> str:
    """What a run's end has that the undisturbed one's has not."""
    if metrics(folder) != metrics_of_whole:
        return "metrics.jsonl is another one"
    if bits(folder, STEPS) != bits_of_whole:
        return "the last checkpoint has other bits"
    left = sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())
    if len(left) != 3 or left[0] != "latest" or left[2] != f"step_{STEPS:06d}":  # an interrupted run saves at any step
        return f"the folder of checkpoints holds {left}"
    return "unreported.json was left" if (folder / "run" / "unreported.json").exists() else ""


def remove(folder: Path) -> None:
    """The folder, into which a killed run's writers may still write."""
    shutil.rmtree(folder, ignore_errors=True)
