"""Renews constraints.txt, the versions that `make env` installs: one resolution for Linux and every supported Python.

    python tools/lock.py             adds and drops what pyproject.toml asks for, keeps every other version
    python tools/lock.py --upgrade   moves everything to the newest versions that pyproject.toml allows

CUDA's packages are left out: the CUDA build of torch pins them itself, and its CPU build has none.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
OF_TORCH = ("cuda-", "nvidia-", "triton")
OF_EVERY_LINE = (" and sys_platform == 'linux'", "python_full_version < '3.15' and ", " ; python_full_version < '3.15'")
"""What [tool.uv] of pyproject.toml says once."""
HEADER = "# What `make env` installs, for Linux and Python 3.11 or newer. Written by `make lock`; do not edit.\n"


def resolve(options: list[str]) -> list[str]:
    """One line `name==version ; marker` for each package of the environment."""
    command = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11", "--no-annotate"]
    command += ["--no-header", "--extra", "dev", "--extra", "docs", "--output-file", str(CONSTRAINTS), *options]
    subprocess.run([sys.executable, "-m", *command, "pyproject.toml"], cwd=ROOT, check=True)
    text = CONSTRAINTS.read_text()
    for marker in OF_EVERY_LINE:
        text = text.replace(marker, "")
    return text.splitlines()


if __name__ == "__main__":
    lines = [line for line in resolve(sys.argv[1:]) if not line.startswith(OF_TORCH)]
    CONSTRAINTS.write_text(HEADER + "\n".join(lines) + "\n")
