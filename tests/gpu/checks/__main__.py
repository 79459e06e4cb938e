"""The checks of `tests.gpu.accept` and `tests.gpu.accept_four`, each in a process of its own.

python -m tests.gpu.checks NAME OUT.json [--dry-run]

A check writes down what it measures and then says what must hold, so a failed one still shows its measurements. With
--dry-run everything is small enough for a CPU, and what only a GPU has is left out.
"""

import json
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from tests.gpu.checks.attention import attention
from tests.gpu.checks.common import Report, Sizes, Skip
from tests.gpu.checks.head import logprob_head
from tests.gpu.checks.machine import ceilings, versions
from tests.gpu.checks.parity import parity, suite
from tests.gpu.checks.race import race
from tests.gpu.checks.runs import cpu_checkpoint, run, vllm_round_trip
from tests.gpu.checks.several import layouts, refit, run_with_servers
from tests.gpu.checks.updates import (
    plain_transformers,
    updates,
    updates_fp8,
    updates_local,
    updates_more_layers,
    whole_updates,
)

CHECKS: dict[str, Callable[[Report, Sizes], None]] = {
    "versions": versions,
    "parity": parity,
    "small_updates": partial(suite, files=["test_updates.py", "test_against_transformers.py"]),
    "actor": partial(suite, files=["test_actor.py"], expression="not fp8"),
    "actor_fp8": partial(suite, files=["test_actor.py"], expression="fp8"),
    "cpu_checkpoint": cpu_checkpoint,
    "race": race,
    "run": run,
    "ceilings": ceilings,
    "attention": attention,
    "updates": updates,
    "whole_updates": whole_updates,
    "logprob_head": logprob_head,
    "plain_transformers": plain_transformers,
    "updates_more_layers": updates_more_layers,
    "updates_local": updates_local,
    "updates_fp8_tensorwise": partial(updates_fp8, recipe="tensorwise"),
    "updates_fp8_blockwise": partial(updates_fp8, recipe="blockwise"),
    "vllm": vllm_round_trip,
    "layouts_fp32": partial(layouts, precision="fp32"),
    "layouts_bf16": partial(layouts, precision="bf16"),
    "refit": refit,
    "run_with_servers": run_with_servers,
}


def out_of_time(number: int, frame: Any) -> None:
    """What has been measured so far is still written."""
    raise TimeoutError("took longer than it may")


def main(name: str, out: Path, size: Sizes) -> None:
    """Run one check and write what came out."""
    report, status, reason = Report(), "passed", ""
    begin = perf_counter()
    signal.signal(signal.SIGTERM, out_of_time)
    try:
        CHECKS[name](report, size)
    except Skip as skip:
        status, reason = "skipped", str(skip)
    except Exception:
        status, reason = "failed", traceback.format_exc()[-4000:]
    if report.faults:
        status = "failed"
    found = {"status": status, "reason": reason, "faults": report.faults, "seconds": perf_counter() - begin}
    out.write_text(json.dumps(found | {"found": report}, default=str))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Sizes.dry() if "--dry-run" in sys.argv else Sizes())
