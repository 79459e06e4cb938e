"""The page of commands, from the table of commands and from what each of them says to --help.

python tools/cli_reference.py > docs/reference/cli.md
"""

import io
import os
import sys
from contextlib import redirect_stdout
from unittest.mock import patch

from nemo_jepo import cli

HEAD = """\
# Command line

<!-- Generated: make reference -->

`.venv/bin/nemo-jepo COMMAND` in a checkout, `nemo-jepo COMMAND` where the package is installed. What you must change is
one line on stderr. Exit codes:

| code | meaning |
| --- | --- |
| 0 | done |
| 1 | failed; of `plan`: the run does not fit |
| 2 | a setting, a file or an argument to change |
| 75 | interrupted and saved: start the same command again to go on |
| 130 | ended at once by Ctrl-C |
"""
SUBCOMMANDS = {"data": ["prepare"]}
"""Commands whose options are those of a second word."""


def help_of(words: list[str]) -> str:
    """What `nemo-jepo WORDS --help` prints, at a width of 100."""
    printed = io.StringIO()
    with redirect_stdout(printed), patch.dict(os.environ, COLUMNS="100"):
        try:
            code = cli.main([*words, "--help"])
        except SystemExit as end:  # argparse's own --help
            code = int(end.code or 0)
    assert code == 0, words
    return printed.getvalue().strip("\n")


def page() -> str:
    """The page, in Markdown."""
    by_help: dict[str, list[str]] = {help_of([]): [""]}  # commands that say the same share a heading
    for name in cli.COMMANDS:
        for words in [[name, word] for word in SUBCOMMANDS.get(name, [])] or [[name]]:
            by_help.setdefault(help_of(words), []).append(" ".join(words))
    parts = (
        f"## nemo-jepo {', '.join(names)}".rstrip() + f"\n\n```text\n{text}\n```\n" for text, names in by_help.items()
    )
    return "\n".join([HEAD, *parts])


if __name__ == "__main__":
    sys.stdout.write(page())
