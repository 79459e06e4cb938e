"""Runs and plots -> one HTML page: style, script and data are inside, and its policy lets nothing else in.

Rollouts are untrusted text. Jinja escapes whatever stands in the markup, `tojson` whatever stands in the data, and the
script only ever makes text nodes of it (the policy's trusted types forbid it anything else).
"""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from nemo_jepo.collapse import ChainWatch
from nemo_jepo.tools.report.drawings import Drawing
from nemo_jepo.tools.report.runs import Run
from nemo_jepo.tools.report.tables import Table
from nemo_jepo.utils.files import write_atomically

HERE = Path(__file__).parent
SCRIPTS = ("elements.js", "charts.js", "rollouts.js")
NOT_SET = "(not set)"


@dataclass(frozen=True, slots=True)
class Chart:
    """One metric of all runs over training."""

    title: str
    unit: str
    metric: str
    low: float | None = None
    """Where the vertical axis begins; None: below the smallest value."""
    high: float | None = None


CHARTS = (
    Chart("Bound", "nats an answer", "train_rollouts/bound"),
    Chart("Held-out proxy NLL", "nats an answer", "val_rollouts/proxy_nll"),
    Chart("Held-out accuracy", "share", "val_rollouts/accuracy", 0, 1),
    Chart("Held-out accuracy, greedy", "share", "val_rollouts/accuracy_greedy", 0, 1),
    Chart("Held-out chain gain", "nats an answer", "val_rollouts/chain_gain"),
    Chart("Verifiable reward", "mean", "train_rollouts/reward", 0, 1),
    Chart("KL to the reference", "nats a chain", "train_rollouts/kl"),
    Chart("Chain of thought", "tokens", "train_rollouts/cot_tokens_mean", 0),
    Chart("Held-out chain gain", "nats, median", "val_rollouts/chain_gain_median"),
    Chart("Marker rate", "share", "train_rollouts/marker_rate", 0, 1),
    Chart("Time of a step", "seconds", "timers/step_time", 0),
)
PHASES = (
    ("weight_sync", "weight sync"),
    ("generate", "sampling"),
    ("logprobs", "scoring"),
    ("init_logprobs", "reference scoring"),
    ("train_time", "update"),
)
"""Timer of a phase of a step, and its name."""
OUTCOMES = (
    ("held-out accuracy", "val_rollouts/accuracy"),
    ("held-out proxy NLL, nats", "val_rollouts/proxy_nll"),
    ("held-out chain gain, nats", "val_rollouts/chain_gain"),
    ("bound, nats", "train_rollouts/bound"),
    ("KL, nats", "train_rollouts/kl"),
    ("chain of thought, tokens", "train_rollouts/cot_tokens_mean"),
)
"""What the table of runs shows, first and last value."""


def write_page(path: Path, runs: Sequence[Run], drawings: Sequence[Drawing], tables: Sequence[Table] = ()) -> None:
    """Write the page, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, render(runs, drawings, tables).encode(errors="replace"))  # lone surrogates


def render(runs: Sequence[Run], drawings: Sequence[Drawing], tables: Sequence[Table] = ()) -> str:
    """The page as HTML."""
    style, script = (HERE / "page.css").read_text(), "\n".join((HERE / name).read_text() for name in SCRIPTS)
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters |= {"number": number, "png": lambda data: "data:image/png;base64," + _base64(data)}
    return environment.get_template("page.html").render(
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        runs=runs,
        outcomes=[(label, [first_and_last(run, metric) for run in runs]) for label, metric in OUTCOMES],
        phases=[name for _, name in PHASES] + ["other"],
        phase_seconds=[phase_seconds(run) for run in runs],
        warnings=[(run.name, warning) for run in runs for warning in chain_warnings(run)],
        differences=differences(runs),
        drawings=drawings,
        tables=tables,
        data={"charts": [asdict(chart) for chart in CHARTS], "runs": [_data(run) for run in runs]},
    )


def _data(run: Run) -> dict[str, Any]:
    return {
        "name": run.name,
        "steps": run.steps,
        "metrics": run.metrics,
        "rollouts": [asdict(step) for step in run.rollouts],
    }


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Every key whose value is not the same in all runs, with its value in each."""
    keys = sorted({key for run in runs for key in run.settings})
    rows = [(key, [_shown(run.settings[key]) if key in run.settings else NOT_SET for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _shown(value: Any) -> str:
    """As YAML spells it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def chain_warnings(run: Run) -> list[str]:
    """What the run said of its chains of thought: that they collapsed, or do not pay."""
    sizes = (f"trainer.jepo.num_{name}" for name in ("prompts_per_step", "generations_per_prompt"))
    watch = ChainWatch(math.prod(int(run.settings.get(size, 0)) for size in sizes))
    return [
        warning
        for index, step in enumerate(run.steps)
        for warning in watch.see(step, {name: values[index] for name, values in run.metrics.items()})
    ]


def first_and_last(run: Run, metric: str) -> tuple[float, float] | None:
    """The first and the last value of a metric that a run logged."""
    values = [value for value in run.metrics.get(metric, []) if value is not None]
    return (values[0], values[-1]) if values else None


def phase_seconds(run: Run) -> list[float] | None:
    """Median seconds of each phase of a step and of the rest of a step; None where steps were not timed."""
    timers = ["timers/step_time", *(f"timers/{timer}" for timer, _ in PHASES)]
    columns = [run.metrics.get(timer, [None] * len(run.steps)) for timer in timers]
    steps = [[value or 0.0 for value in line] for line in zip(*columns, strict=True) if line[0] is not None]
    if not steps:
        return None
    rest = [total - sum(phases) for total, *phases in steps]
    return [median(phase) for phase in list(zip(*steps, strict=True))[1:]] + [max(median(rest), 0.0)]


def number(value: float) -> str:
    """Four significant digits, with a true minus sign."""
    return f"{value:.4g}".replace("-", "\N{MINUS SIGN}")


def _hash(text: str) -> str:
    """As a content security policy names a script or a style."""
    return "sha256-" + _base64(hashlib.sha256(text.encode()).digest())


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
