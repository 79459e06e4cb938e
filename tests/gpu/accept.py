"""Acceptance on one GPU: ordered checks, each in its own process with its own time limit, one JSON and one page.

    python -m tests.gpu.accept [--out FOLDER] [--only NAME ...] [--side-by-side N] [--dry-run]

What fails or takes too long does not stop the rest. Checks that time nothing run side by side first; those that do
follow one by one. With --dry-run the same code runs on a CPU in small. Needs no network. Exit code 1 if a check failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_jepo.utils.processes import die_with_parent

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Check:
    """What is run, for how long at most, and whether it wants the GPU for itself."""

    name: str
    seconds: int
    times: bool = False


CHECKS = (
    Check("versions", 60),
    Check("parity", 120),
    Check("small_updates", 180),
    Check("actor", 240),
    Check("actor_fp8", 150),
    Check("cpu_checkpoint", 200),
    Check("race", 60),
    Check("run", 150),
    Check("vllm", 600),
    Check("ceilings", 60, times=True),
    Check("attention", 90, times=True),
    Check("updates", 120, times=True),
    Check("whole_updates", 120, times=True),
    Check("logprob_head", 90, times=True),
    Check("plain_transformers", 90, times=True),
    Check("updates_more_layers", 90, times=True),
    Check("updates_local", 90, times=True),
    Check("updates_fp8_tensorwise", 90, times=True),
    Check("updates_fp8_blockwise", 90, times=True),
)


def run(check: Check, dry: bool) -> dict[str, Any]:
    """One check's outcome: status, reason, faults, seconds, found."""
    begin = time.monotonic()
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path} | ({"CUDA_VISIBLE_DEVICES": ""} if dry else {})
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
        out = Path(folder) / "out.json"
        command = [sys.executable, "-W", "ignore", "-m", "tests.gpu.checks", check.name, str(out)]
        process = subprocess.Popen(
            command + ["--dry-run"] * dry,
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,  # else it would hold the GPU when this program is killed
        )
        try:
            process.wait(check.seconds)
            reason = f"ended with exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            process.terminate()  # it writes down what it has
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()
            reason = f"took longer than {check.seconds} s"
        took = time.monotonic() - begin
        log.seek(0)
        tail = log.read()[-3000:]
        if out.exists():
            return json.loads(out.read_text()) | {"wall_seconds": took, "log": tail[-1500:]}
    return {"status": "failed", "reason": reason, "faults": [], "found": {}, "wall_seconds": took, "log": tail}


def page(title: str, outcomes: dict[str, dict[str, Any]]) -> str:
    """The outcomes as Markdown."""
    lines = [f"# {title}", "", "| check | outcome | seconds |", "| --- | --- | --- |"]
    for name, outcome in outcomes.items():
        lines.append(f"| {name} | {outcome['status']} | {outcome['wall_seconds']:.0f} |")
    for name, outcome in outcomes.items():
        lines += ["", f"## {name}: {outcome['status']}", ""]
        if outcome["reason"]:
            lines += ["```", outcome["reason"].strip(), "```", ""]
        lines += [f"- does not hold: {fault}" for fault in outcome["faults"]]
        lines += list(as_list(outcome["found"]))
        if outcome["status"] == "failed" and not outcome["found"]:
            lines += ["", "```", outcome["log"].strip(), "```"]
    return "\n".join(lines) + "\n"


def as_list(found: Any, depth: int = 0) -> list[str]:
    """Nested measurements as a nested list."""
    lines = []
    for name, value in found.items():
        if isinstance(value, dict):
            lines += [f"{'  ' * depth}- {name}", *as_list(value, depth + 1)]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines += [f"{'  ' * depth}- {name}"]
            lines += [f"{'  ' * (depth + 1)}- {', '.join(map(shown, item.values()))}" for item in value]
        elif isinstance(value, list):
            lines.append(f"{'  ' * depth}- {name}: {', '.join(map(shown, value))}")
        else:
            lines.append(f"{'  ' * depth}- {name}: {shown(value)}")
    return lines


def shown(value: Any) -> str:
    """A number with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(
    arguments: list[str] | None = None,
    checks: Sequence[Check] = CHECKS,
    description: str | None = __doc__,
    out: str = "acceptance",
) -> int:
    """Run the checks; the description's first line, up to its colon, is the title of the page."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    names, title = [check.name for check in checks], str(description).partition(":")[0]
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--side-by-side", type=int, default=4)
    parser.add_argument("--dry-run", action="store_true", help="small sizes on a CPU, also where there is a GPU")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = [check for check in checks if check.name in options.only]
    outcomes: dict[str, dict[str, Any]] = {}

    def work(check: Check) -> None:
        outcomes[check.name] = run(check, options.dry_run)
        print(
            f"{check.name}: {outcomes[check.name]['status']}, {outcomes[check.name]['wall_seconds']:.0f} s", flush=True
        )
        for fault in outcomes[check.name]["faults"]:
            print(f"    does not hold: {fault}", flush=True)
        if outcomes[check.name]["reason"]:
            print("    " + outcomes[check.name]["reason"].strip().replace("\n", "\n    ")[-1200:], flush=True)
        ordered = {name: outcomes[name] for name in names if name in outcomes}
        (options.out / "acceptance.json").write_text(json.dumps(ordered, indent=1))
        (options.out / "acceptance.md").write_text(page(title, ordered))

    with ThreadPoolExecutor(options.side_by_side) as pool:
        list(pool.map(work, [check for check in chosen if not check.times]))
    for check in chosen:
        if check.times:
            work(check)
    return int(any(outcome["status"] == "failed" for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
