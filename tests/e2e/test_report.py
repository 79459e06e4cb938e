"""`nemo-jepo report` as a user runs it."""

import pytest

from tests.support import fork_server
from tests.support.command_line import ENVIRONMENT
from tests.support.report_folders import write_run

pytestmark = pytest.mark.quick


def test_the_command_writes_a_page_and_prints_where(tmp_path):
    folder, out = write_run(tmp_path / "mine"), tmp_path / "new" / "page.html"
    done = fork_server.run(["-m", "nemo_jepo.cli", "report", str(folder), "--out", str(out)], environment=ENVIRONMENT)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{out}\n", "")
    assert "<title>nemo_jepo report: mine</title>" in out.read_text()
