"""What the arms of an experiment came to: the values after the last update, as tables.

    arm     accuracy (oracle)         proxy NLL, nats
    jepo    0.954 (0.943 to 0.961)    0.067 (0.046 to 0.096)

A cell is the mean over seeds, with the smallest and the largest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemo_jepo.tools.report.results import Band, Comparison

COLUMNS = {
    "oracle_accuracy": ("accuracy (oracle)", 3),
    "oracle_accuracy_verifiable": ("of it: verifiable answers", 3),
    "oracle_accuracy_unverifiable": ("of it: the others", 3),
    "consistent_accuracy": ("both of a pair right", 3),
    "one_sided_rate": ("one of a pair right", 3),
    "unread_rate": ("unread judgements", 3),
    "accuracy": ("accuracy (exact match)", 3),
    "accuracy_greedy": ("accuracy (greedy)", 3),
    "maj_at_16": ("majority of 16", 3),
    "weighted_maj_at_16": ("weighted vote of 16", 3),
    "best_at_16": ("best of 16", 3),
    "verdict_accuracy": ("verdicts that are right", 3),
    "proxy_nll": ("proxy NLL, nats", 3),
    "chain_gain": ("chain gain, nats", 2),
    "kl": ("KL, nats", 2),
    "cot_tokens_mean": ("chain of thought, tokens", 1),
}
"""Metric -> head of its column, and decimals."""
REPEATS = {"oracle_accuracy": ("oracle_accuracy_verifiable", "oracle_accuracy_unverifiable", "accuracy")}
"""Columns that say nothing new where they equal this one."""
START = "at step 0"


@dataclass(frozen=True, slots=True)
class Table:
    """The arms of one experiment in one regime."""

    title: str
    caption: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]
    """Name of an arm and its cells; first START, where all arms begin alike."""


def tables_of(results: Sequence[Comparison]) -> list[Table]:
    """A table for every comparison that logged one of the columns."""
    return [table for comparison in results if (table := _table(comparison))]


def markdown(tables: Sequence[Table]) -> str:
    """The tables under their titles."""
    return "\n\n".join(_markdown(table) for table in tables) + "\n"


def _table(comparison: Comparison) -> Table | None:
    logged = {metric: [_band(comparison, arm, metric) for arm in comparison.arms] for metric in COLUMNS}
    bands = [band for column in logged.values() for band in column if band]
    if not bands:
        return None
    cells = {
        metric: [_start(metric, column), *(_cell(metric, band, -1) for band in column)]
        for metric, column in logged.items()
        if any(column)
    }
    same = {other for metric, others in REPEATS.items() for other in others if cells.get(other) == cells.get(metric)}
    columns = {metric: column for metric, column in cells.items() if metric not in same}
    rows = list(zip([START, *comparison.arms], map(list, zip(*columns.values(), strict=True)), strict=True))
    if None in rows[0][1] or not any(rows[0][1]):
        del rows[0]
    seeds = " to ".join(str(count) for count in sorted({len(band.seeds) for band in bands}))
    title = f"{comparison.experiment} ({comparison.regime}, {seeds} seed{'s' * (seeds != '1')})"
    caption = f"After update {_ends(comparison, logged)}, held out: mean over seeds (smallest to largest)."
    return Table(title, caption, [COLUMNS[metric][0] for metric in columns], rows)


def _ends(comparison: Comparison, logged: Mapping[str, Sequence[Band | None]]) -> str:
    """The last update, and those of arms that end before it."""
    steps = {
        arm: [band.steps[-1] for column in logged.values() if (band := column[place])]
        for place, arm in enumerate(comparison.arms)
    }
    found = {arm: max(ends) for arm, ends in steps.items() if ends}
    last = max(found.values())
    sooner = ", ".join(f"`{arm}`: {end}" for arm, end in found.items() if end < last)
    return f"{last} ({sooner})" if sooner else f"{last}"


def _band(comparison: Comparison, arm: str, metric: str) -> Band | None:
    found = comparison.bands(arm, metric)
    return found[0] if found else None


def _start(metric: str, column: Sequence[Band | None]) -> str | None:
    """The cell of step 0; empty if no arm has logged it, None if arms differ."""
    cells = {_cell(metric, band, 0) for band in column if band and band.steps[0] == 0}
    return next(iter(cells), "") if len(cells) <= 1 else None


def _cell(metric: str, band: Band | None, place: int) -> str:
    if band is None:
        return ""
    decimals = COLUMNS[metric][1]
    values = (band.mean[place], band.low[place], band.high[place])
    mean, *ends = (f"{round(value, decimals) + 0.0:.{decimals}f}" for value in values)  # + 0.0: no -0.00
    return mean if len(band.seeds) == 1 else f"{mean} ({' to '.join(ends)})"


def _markdown(table: Table) -> str:
    lines = [["arm", *table.columns], ["---", *["---:"] * len(table.columns)]]
    lines += [[f"`{arm}`" if arm != START else arm, *cells] for arm, cells in table.rows]
    return "\n".join([f"### {table.title}", "", table.caption, "", *(f"| {' | '.join(line)} |" for line in lines)])
