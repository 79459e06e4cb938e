"""What the doctor says: one line a subject, and what to do about it."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

OK, WARNING, BLOCKER = "ok", "warning", "blocker"
_STYLES = {OK: "green", WARNING: "yellow", BLOCKER: "bold red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One look at one subject."""

    level: str
    """ok, warning (a run would work, worse than it could) or blocker (it would not)."""
    subject: str
    text: str
    fix: str = ""
    """What to do; empty where all is well."""


@dataclass(frozen=True, slots=True)
class Located:
    """A finding and the nodes that have it."""

    finding: Finding
    nodes: tuple[str, ...]
    """Empty: all of them."""


def locate(by_rank: Sequence[tuple[str, Sequence[Finding]]]) -> list[Located]:
    """The findings of all ranks, each once, in the order of the first rank that has it.

    Args:
        by_rank: (node, findings) of every rank.
    """
    owners: dict[Finding, list[str]] = {}
    for node, findings in by_rank:
        for finding in findings:
            owners.setdefault(finding, []).append(node)
    all_nodes = {node for node, _ in by_rank}
    return [
        Located(finding, () if set(nodes) == all_nodes else tuple(dict.fromkeys(nodes)))
        for finding, nodes in owners.items()
    ]


def is_blocked(located: Iterable[Located]) -> bool:
    """Whether a run would not work."""
    return any(found.finding.level == BLOCKER for found in located)


def to_json(located: Iterable[Located]) -> str:
    """One object: findings, and whether one of them is a blocker."""
    located = list(located)
    findings = [asdict(found.finding) | {"nodes": list(found.nodes)} for found in located]
    return json.dumps({"blocked": is_blocked(located), "findings": findings}, indent=1)


def show(located: Iterable[Located], console: Console) -> None:
    """A table; the fix below what needs one."""
    table = Table(box=None, pad_edge=False)
    for heading in ("", "subject", "finding"):
        table.add_column(heading, overflow="fold")
    for found in located:
        finding = found.finding
        where = f"{', '.join(found.nodes)}: " if found.nodes else ""
        text = f"{where}{finding.text}" + (f"\n{finding.fix}." if finding.fix else "")
        table.add_row(finding.level, finding.subject, text, style=_STYLES[finding.level] if finding.fix else "")
    console.print(table, markup=False, highlight=False)
