"""A run folder as the page shows it: settings, metrics and rollouts, every field checked.

The files may be of a run that still trains, of one that was killed, or of somebody else: whatever does not fit is one
line that names file, line and rule.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

import yaml

from nemo_jepo.config.compose import flatten
from nemo_jepo.config.errors import DataError
from nemo_jepo.tools.report.results import RENAMED

Item = TypeVar("Item")
Sample = dict[str, Any]
"""One rollout, with the names of `nemo_jepo.metrics.rollout_records` and the two of `_sample`."""


@dataclass(frozen=True, slots=True)
class Step:
    """The rollouts that were written at one step."""

    phase: str
    """training or validation."""
    step: int
    samples: list[Sample]


@dataclass(frozen=True, slots=True)
class Run:
    """One run folder."""

    name: str
    settings: dict[str, Any]
    """Dotted key -> value, as config.yaml has it."""
    steps: list[int]
    """The step of every line of metrics.jsonl."""
    metrics: dict[str, list[float | None]]
    """Metric -> its value at every one of `steps`, None where it was not logged or not finite."""
    rollouts: list[Step]
    num_left_out: int
    """Steps whose rollouts are on the disk and not here."""


def read_runs(folders: Sequence[Path], max_rollout_steps: int) -> list[Run]:
    """The runs in the order given, each under a name of its own.

    Args:
        max_rollout_steps: keep the rollouts of so many steps of a run, training and validation each.
    Raises:
        DataError: a folder, file, line or field is missing or broken.
    """
    return [read_run(folder, name, max_rollout_steps) for folder, name in zip(folders, names_of(folders), strict=True)]


def names_of(folders: Sequence[Path]) -> list[str]:
    """The path of every run below the folder that holds them all."""
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    if len(set(paths)) < len(paths):
        raise DataError(f"{', '.join(map(str, folders))}: a run is given twice. Give each once.")
    return [str(path.relative_to(os.path.commonpath([it.parent for it in paths]))) for path in paths]


def read_run(folder: Path, name: str, max_rollout_steps: int) -> Run:
    """See `read_runs`."""
    for file, made_by in (("config.yaml", "a run writes it when it starts"), ("metrics.jsonl", "its first step")):
        if not (folder / file).is_file():
            what = f"no {file} ({made_by})" if folder.is_dir() else "no such folder"
            hint = f" Its warm-up is {folder / 'warmup'}." if (folder / "warmup" / file).is_file() else ""
            raise DataError(f"{folder}: {what}. Give a run folder, <exp_dir>/<name>.{hint}")
    steps, metrics = _read_metrics(folder / "metrics.jsonl")
    rollouts, num_left_out = _read_rollouts(folder / "rollouts", max_rollout_steps)
    return Run(name, _read_settings(folder / "config.yaml"), steps, metrics, rollouts, num_left_out)


# ---- settings -------------------------------------------------------------------------------------------------


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{file}: not YAML ({reason}). Give the folder of a whole run.") from None
    if not isinstance(settings, dict):
        raise DataError(f"{file}: holds no settings. Give the folder of a whole run.")
    return dict(flatten(settings))


# ---- metrics --------------------------------------------------------------------------------------------------


def _read_metrics(file: Path) -> tuple[list[int], dict[str, list[float | None]]]:
    lines = list(_records(file, _metrics_line))
    if not lines:
        raise DataError(f"{file}: holds no step yet. Wait for the run's first step.")
    names = dict.fromkeys(name for _, metrics in lines for name in metrics)
    return [step for step, _ in lines], {name: [metrics.get(name) for _, metrics in lines] for name in names}


def _metrics_line(record: Mapping[str, Any]) -> tuple[int, dict[str, float | None]]:
    step = int(record["step"])
    return step, {RENAMED.get(name, name): _number(value) for name, value in record.items() if name != "step"}


# ---- rollouts -------------------------------------------------------------------------------------------------


def _read_rollouts(folder: Path, max_steps: int) -> tuple[list[Step], int]:
    """Evenly spaced steps of each phase, first and last among them, and how many were left out."""
    read: list[Step] = []
    num_left_out = 0
    for phase, prefix in (("training", "step"), ("validation", "validation")):
        named = ((re.fullmatch(prefix + r"_(\d+)\.jsonl", file.name), file) for file in folder.glob("*.jsonl"))
        found = sorted((int(match[1]), file) for match, file in named if match)
        kept = evenly(found, max_steps)
        num_left_out += len(found) - len(kept)
        read += [Step(phase, step, list(_records(file, _sample))) for step, file in kept]
    return read, num_left_out


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` items, evenly spaced, the last and (with count > 1) the first among them."""
    if count >= len(items):
        return list(items)
    last = len(items) - 1
    return [items[last - last * index // max(count - 1, 1)] for index in reversed(range(count))]


def _sample(record: Mapping[str, Any]) -> Sample:
    """The record's fields with their types, and what the page says of the sample: status, answer_logprob.

    Raises:
        ValueError: lengths that do not agree.
    """
    prompt, chain, answer = (int(record[f"{part}_length"]) for part in ("prompt", "chain", "answer"))
    tokens, token_ids = [str(text) for text in record["tokens"]], [int(number) for number in record["token_ids"]]
    policy = [_number(value) for value in record["policy_logprobs"]]
    generation = [_number(value) for value in record["generation_logprobs"]]
    marker = None if record["marker"] is None else [int(end) for end in record["marker"]]
    if min(prompt, chain, answer) < 0 or not len(tokens) == len(token_ids) == prompt + chain + answer:
        raise ValueError("tokens, token_ids and the three lengths do not agree")
    if len(policy) != chain + answer or len(generation) > chain + answer:
        raise ValueError("log-probs and lengths do not agree")
    if marker is not None and (len(marker) != 2 or not prompt <= marker[0] < marker[1] <= prompt + chain):
        raise ValueError("the marker is not in the chain of thought")
    scored = [value for value in policy[chain:] if value is not None]
    return {
        "prompt_id": int(record["prompt_id"]),
        "sample": int(record["sample"]),
        "prompt": str(record["prompt"]),
        "reference_answer": str(record["reference_answer"]),
        "text": None if record.get("text") is None else str(record["text"]),
        "valid": bool(record["valid"]),
        "own_answer": bool(record["own_answer"]),
        "status": _status(record),
        "prompt_length": prompt,
        "chain_length": chain,
        "answer_length": answer,
        "marker": marker,
        "tokens": tokens,
        "token_ids": token_ids,
        "policy_logprobs": policy,
        "generation_logprobs": generation,
        "answer_logprob": sum(scored) if scored and len(scored) == answer else None,
        **{name: _number(record.get(name)) for name in ("advantage", "policy_weight", "answer_weight", "chain_gain")},
    }


def _status(record: Mapping[str, Any]) -> str:
    """Valid, or why a sample counts in no bound."""
    if record["failed"]:
        return "failed"
    if record["valid"]:
        return "valid"
    if record["marker"] is None:
        return "no marker"
    return "marker ends inside a token" if record["misaligned"] else "chain too short"


# ---- lines ----------------------------------------------------------------------------------------------------


def _records(file: Path, read: Callable[[Mapping[str, Any]], Item]) -> Iterator[Item]:
    """Every line of a JSONL file through `read`; a last line that is still being written is passed over."""
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            yield read(json.loads(line, parse_constant=_no_constant))
        except KeyError as error:
            raise DataError(f"{file}, line {number}: no field {error}. {_FIX}") from None
        except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
            raise DataError(f"{file}, line {number}: not a record of a run ({error}). {_FIX}") from None


_FIX = "Remove the line, or the file if another version of nemo_jepo wrote it."


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _number(value: Any) -> float | None:
    """A finite number, None where there is none.

    Raises:
        ValueError: something else.
    """
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)):
        return value
    raise ValueError(f"{value!r:.40} is no number")
