"""results.parquet of `nemo-jepo experiment`, in long form, as curves with their spread over seeds.

    experiment  regime  arm  seed  step  metric  value        one row a value, metric with or without val_rollouts/

An experiment compares arms in one or several regimes; where all are named key_number, it is an ablation of the key.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_jepo.config.errors import DataError

COLUMNS = ("experiment", "regime", "arm", "seed", "step", "metric", "value")
RENAMED = {"train_optim/loss": "train_optim/surrogate_loss"}
"""What older runs call a metric -> its name, so that they stand in one chart with newer ones."""
REGIMES = ("verifiable", "semi-verifiable", "unverifiable")
"""In the order of the paper; others come after them."""
Seeds = dict[int, dict[int, float]]
"""seed -> step -> value."""
Arm = dict[str, Seeds]
"""metric -> its values."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The arms of one experiment in one regime, in the order of the file."""

    experiment: str
    regime: str
    arms: Mapping[str, Arm]

    @property
    def ablated(self) -> str | None:
        """The key whose values the arms compare; None where the arms are something else."""
        keys = {parsed[0] if (parsed := key_and_number(arm)) else None for arm in self.arms}
        return keys.pop() if len(keys) == 1 and len(self.arms) > 1 else None

    def bands(self, arm: str, *metrics: str) -> list["Band"] | None:
        """Mean and spread of metrics of an arm over the seeds and steps that they all have; None without any."""
        curves = [self.arms[arm].get(metric, {}) for metric in metrics]
        seeds = sorted(set.intersection(*(set(curve) for curve in curves)))
        if not seeds:
            return None
        steps = sorted(set.intersection(*(set(curve[seed]) for curve in curves for seed in seeds)))
        return [band(steps, [curve[seed] for seed in seeds]) for curve in curves] if steps else None


VOTES = {"maj": "majority", "weighted_maj": "weighted vote", "best": "best of them"}
"""Metrics of an evaluation by the number of samples, as in weighted_maj_at_8 -> how an answer is chosen."""


def votes(comparison: Comparison) -> list[Comparison]:
    """Of each arm whose samples have verdicts: how often the answer is right that a vote chooses, by the number of
    samples, after the arm's last update. The metrics are `samples` and `chosen`; the numbers of samples are also the
    steps."""
    found = []
    for arm, metrics in comparison.arms.items():
        chosen = {label: _by_samples(metrics, vote) for vote, label in VOTES.items()}
        if all(chosen.values()):
            arms = {label: {"samples": _steps(curves), "chosen": curves} for label, curves in chosen.items()}
            found.append(Comparison(comparison.experiment, f"{comparison.regime}: {arm}", arms))
    return found


def _steps(curves: Seeds) -> Seeds:
    """Every step as its own value."""
    return {seed: {step: float(step) for step in curve} for seed, curve in curves.items()}


def _by_samples(metrics: Arm, vote: str) -> Seeds:
    """Seed -> number of samples -> value."""
    found: Seeds = {}
    for metric, curves in metrics.items():
        if number := re.fullmatch(rf"{vote}_at_(\d+)", metric):
            for seed, curve in curves.items():
                found.setdefault(seed, {})[int(number[1])] = curve[max(curve)]
    return found


@dataclass(frozen=True, slots=True)
class Band:
    """A metric of one arm at some steps."""

    steps: list[int]
    mean: list[float]
    low: list[float]
    """Smallest over seeds."""
    high: list[float]
    seeds: list[list[float]]
    """[seeds][steps]."""


def band(steps: list[int], curves: Sequence[Mapping[int, float]]) -> Band:
    """Mean, smallest and largest over the curves of the seeds, each step -> value."""
    columns = [[curve[step] for curve in curves] for step in steps]
    mean = [math.fsum(column) / len(column) for column in columns]
    seeds = [[curve[step] for step in steps] for curve in curves]
    return Band(steps, mean, [min(column) for column in columns], [max(column) for column in columns], seeds)


def key_and_number(arm: str) -> tuple[str, float] | None:
    """("beta_sup", 0.01) of beta_sup_0.01 and of beta_sup=0.01, None of a name of another form."""
    match = re.fullmatch(r"([A-Za-z][\w.]*?)[_=]([-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?)", arm)
    return (match[1], float(match[2])) if match else None


def read_all(files: Sequence[Path]) -> list[Comparison]:
    """Those of every file, regime by regime.

    Raises:
        DataError: see `read_results`.
    """
    found = [comparison for file in files for comparison in read_results(file)]
    return sorted(found, key=lambda it: REGIMES.index(it.regime) if it.regime in REGIMES else len(REGIMES))


def read_results(file: Path) -> list[Comparison]:
    """Every experiment and regime of the file.

    Raises:
        DataError: no such file, no Parquet, a column is missing or holds what it must not.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except FileNotFoundError:
        raise DataError(f"{file}: no such file. Give the results.parquet of an experiment.") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: no Parquet ({str(error).splitlines()[0]}). Give a results.parquet.") from None
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise DataError(f"{file}: no column {', '.join(missing)}. It needs {', '.join(COLUMNS)}.")
    try:
        found = _nested(zip(*(table[name].to_pylist() for name in COLUMNS), strict=True))
    except (TypeError, ValueError) as error:
        raise DataError(f"{file}: a row has another type than its column should ({error}). Write it anew.") from None
    if not found:
        raise DataError(f"{file}: holds no row. Run an experiment first.")
    return [Comparison(experiment, regime, arms) for (experiment, regime), arms in found.items()]


def _nested(rows: Iterator[tuple]) -> dict[tuple[str, str], dict[str, Arm]]:
    """Rows by experiment and regime, arm, metric, seed and step; without values that are no numbers."""
    found: dict[tuple[str, str], dict[str, Arm]] = {}
    for experiment, regime, arm, seed, step, metric, value in rows:
        metrics = found.setdefault((str(experiment), str(regime)), {}).setdefault(str(arm), {})
        if value is not None and math.isfinite(value):
            name = RENAMED.get(str(metric), str(metric)).removeprefix("val_rollouts/")
            seeds = metrics.setdefault(name, {})
            seeds.setdefault(int(seed), {})[int(step)] = float(value)
    return found
