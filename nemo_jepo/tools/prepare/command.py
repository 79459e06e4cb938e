"""`nemo-jepo data prepare`: arguments in, exit code out."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from nemo_jepo.config.errors import ConfigError, DataError
from nemo_jepo.tools.prepare.prepare import prepare
from nemo_jepo.tools.prepare.published import PUBLISHED

DONE, WRONG, INTERRUPTED = 0, 2, 130


def main(arguments: list[str], judge: Callable[[Sequence[str], int], Sequence[bool | None]]) -> int:
    """Prepare one data set and print its files; a mistake of the user's is one line on stderr and 2.

    Args:
        judge: (answers, worker processes) -> whether the verifier can grade each answer.
    """
    chosen = _parser().parse_args(arguments)
    try:
        if chosen.local and chosen.revision:
            raise ConfigError("--revision", chosen.revision, "a local copy has none", "Leave out --revision or --from")
        folder = prepare(
            chosen.name,
            chosen.out,
            lambda answers: judge(answers, chosen.workers),
            chosen.local,
            chosen.revision,
        )
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    for file, counts in json.loads((folder / "manifest.json").read_text())["files"].items():
        print(f"{folder / file}  {counts['rows']} rows, {counts['verifiable']} verifiable")
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nemo-jepo data", allow_abbrev=False)
    commands = parser.add_subparsers(metavar="prepare", required=True)
    command = commands.add_parser(
        "prepare", help="write a published data set as Parquet with a manifest", allow_abbrev=False
    )
    command.add_argument("name", metavar="NAME", help=", ".join(PUBLISHED))
    command.add_argument("--out", type=Path, default=Path("data"), help="folder that gets the folder NAME (data)")
    command.add_argument("--from", dest="local", type=Path, metavar="PATH", help="a local copy: file or folder")
    command.add_argument("--revision", help="another revision than the pinned one")
    cpus = len(os.sched_getaffinity(0))
    command.add_argument("--workers", type=_count, default=cpus, help=f"verifier processes ({cpus})")
    return parser


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return count
