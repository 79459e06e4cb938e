"""`nemo-jepo checkpoint` without the training environment."""

import subprocess
import sys

import pytest

from tests.support.command_line import ENVIRONMENT
from tests.unit.test_checkpoints import write

pytestmark = pytest.mark.quick


def test_the_command_needs_no_torch(tmp_path):
    """It answers at once, also on a login node without the training environment's memory."""
    for step in (2, 4, 10):
        write(tmp_path / "checkpoints", step)
    code = "import sys; from nemo_jepo.checkpoint.format import checkpoint_command as run; code = run(sys.argv[1:])"
    code += "; assert not {'torch', 'megatron'} & sys.modules.keys(); sys.exit(code)"
    command = [sys.executable, "-c", code, "list", str(tmp_path)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.count("whole") == 3, done.stderr
