"""python -m tests.chaos [--kills N] [--signals N] [--stuck N] [--servers N] [--seed S] [--out FILE]

Disturb real runs of a tiny model on this machine, and compare each with one that nobody disturbed. Prints one line a
disturbance and a Markdown table; exit code 1 if anything broke. 200 kills take about half an hour of one core.
"""

import argparse
import importlib
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.rounds import Round
from tests.support import fork_server

CAMPAIGNS = {"kills": 20, "signals": 10, "stuck": 2, "servers": 0}
"""A module of this folder each, with `rounds(seed, number)`; and how many by default."""


def table(found: dict[str, list[Round]]) -> str:
    """A row for each kind of disturbance."""
    lines = ["| campaign | tried | identical | broke | seconds each |", "| --- | --- | --- | --- | --- |"]
    for name, rounds in found.items():
        kinds: dict[str, list[Round]] = defaultdict(list)
        for one in rounds:
            kinds[one.kind].append(one)
        for label, some in [*sorted(kinds.items()), ("all", rounds)]:
            broke = sum(bool(one.problems) for one in some)
            seconds = sum(one.seconds for one in some) / max(len(some), 1)
            lines.append(f"| {name}: {label} | {len(some)} | {len(some) - broke} | {broke} | {seconds:.1f} |")
    return "\n".join(lines)


def told(name: str, seed: int, number: int) -> Iterator[Round]:
    """The rounds of a campaign, each with a line about it."""
    for index, one in enumerate(importlib.import_module(f"tests.chaos.{name}").rounds(seed, number), 1):
        print(
            f"{time.strftime('%T')} {name} {index}/{number}: {one.kind}, {'; '.join(one.problems) or 'ok'}", flush=True
        )
        yield one


def main() -> int:
    """Run the campaigns that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, number in CAMPAIGNS.items():
        parser.add_argument(f"--{name}", type=int, default=number, metavar="N", help=f"default {number}")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the moments")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the table goes as well")
    arguments = parser.parse_args()
    folder = fork_server.make_session_folder()
    try:
        numbers = {name: getattr(arguments, name) for name in CAMPAIGNS}
        found = {name: list(told(name, arguments.seed, number)) for name, number in numbers.items() if number > 0}
    finally:
        fork_server.remove_session_folder(folder)
    page = table(found)
    print(f"\n{page}")
    if arguments.out is not None:
        arguments.out.write_text(f"{page}\n")
    return int(any(one.problems for rounds in found.values() for one in rounds))


if __name__ == "__main__":
    sys.exit(main())
