"""pip finds what the Dockerfiles pin."""

import re
import subprocess
import sys

import pytest

from tests.unit.test_containers import GPU, PACKAGES, arguments


@pytest.mark.nightly
def test_pip_knows_every_pinned_version():
    """The index alone is asked, for all at once: the wheels themselves are gigabytes."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries=0", "--timeout=15"]
    asked = {
        name: subprocess.Popen(
            [*pip, "index", "versions", package], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for name, package in PACKAGES.items()
    }
    answers = {name: process.communicate(timeout=200) for name, process in asked.items()}
    if any(process.returncode for process in asked.values()):
        pytest.skip(f"pip reaches no index: {max(error for _, error in answers.values()).strip()[-200:]}")
    for name, (answer, _) in answers.items():
        known = re.search(r"^Available versions: (.*)$", answer, re.MULTILINE)
        assert known is not None and arguments(GPU)[name] in known[1].split(", "), name
