"""The command line of `nemo-jepo data`."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.rewards.verifiable import verifiable_answers
from nemo_jepo.tools.prepare.prepare import prepare
from nemo_jepo.tools.prepare.published import PUBLISHED
from nemo_jepo.utils.exit_codes import DONE


def main(argv: Sequence[str]) -> int:
    """`nemo-jepo data`: prepare one data set and print its files. An interrupted one leaves nothing.

    Raises:
        ConfigError: arguments that do not go together, a folder that exists.
        DataError: data that cannot be reached, read or written.
    """
    chosen = _parser().parse_args(list(argv))
    if chosen.local and chosen.revision:
        raise ConfigError("--revision", chosen.revision, "a local copy has none", "Leave out --revision or --from")
    judge = partial(verifiable_answers, num_workers=chosen.workers)
    folder = prepare(chosen.name, chosen.out, judge, chosen.local, chosen.revision)
    manifest = json.loads((folder / "manifest.json").read_text())
    if "conditions" in manifest["source"]:
        print(manifest["source"]["conditions"], file=sys.stderr)
    for file, counts in manifest["files"].items():
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
    command.add_argument("--workers", type=_count, default=cpus, help="verifier processes; default: one for each CPU")
    return parser


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return count
