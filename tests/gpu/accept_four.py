"""Acceptance on four GPUs: what one cannot show, in a quarter of an hour, as `tests.gpu.accept` does it.

    python -m tests.gpu.accept_four [--out FOLDER] [--only NAME ...] [--dry-run]

Layouts over NCCL, weights to two servers in one group, a server that is killed in mid-push, a run with its own servers.
"""

import sys

from tests.gpu.accept import Check, main

CHECKS = (
    Check("versions", 60, times=True),
    Check("layouts_fp32", 240, times=True),
    Check("layouts_bf16", 240, times=True),
    Check("refit", 400, times=True),
    Check("run_with_servers", 300, times=True),
)

if __name__ == "__main__":
    sys.exit(main(checks=CHECKS, description=__doc__, out="acceptance_four"))
