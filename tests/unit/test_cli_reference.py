"""docs/reference/cli.md says what the commands say."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_of_commands_is_what_they_print():
    spec = importlib.util.spec_from_file_location("cli_reference", ROOT / "tools" / "cli_reference.py")
    cli_reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cli_reference)
    page = (ROOT / "docs" / "reference" / "cli.md").read_text()
    assert cli_reference.page() == page, "run `make reference`"
