"""What every benchmark does with its measurements: compare repetitions, print a table, write JSON."""

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

Metrics = dict[str, float]
Round = dict[str, Metrics]
"""One repetition: every variant's metrics, taken right after each other."""


def machine() -> dict[str, Any]:
    """What the metrics were taken on, and how busy it is (load: runnable processes, mean of the last minute)."""
    return {
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
    }


def medians(rounds: Sequence[Round]) -> Round:
    """Every metric of every variant, median over the repetitions."""
    return {
        variant: {name: median(metrics[variant][name] for metrics in rounds) for name in rounds[0][variant]}
        for variant in rounds[0]
    }


def paired_ratio(rounds: Sequence[Round], name: str, variant: str, baseline: str) -> float:
    """Median over the repetitions of variant / baseline.

    Both come from one repetition, seconds apart, so that a neighbour's load on the machine falls on both.
    """
    return median(metrics[variant][name] / metrics[baseline][name] for metrics in rounds)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side, the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def write(report: dict[str, Any], out: Path | None) -> None:
    """The report as JSON, where one is asked for."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=2) + "\n")
