"""nemo-jepo checkpoint list RUN_FOLDER | verify CHECKPOINT

    list      every checkpoint of a run: whole or what is missing, size, date
    verify    reads every byte of one again and names the first broken file

Exit code 0 when all is whole, 1 when something is not, 2 for a wrong command line.
"""

import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from nemo_jepo.checkpoint.format import MARKER, broken_file, checkpoints_in, fault_of, read_marker, rests_in
from nemo_jepo.config.errors import ConfigError
from nemo_jepo.utils.exit_codes import BAD_SETTINGS, DONE, FAILED

USAGE = "usage: nemo-jepo checkpoint list RUN_FOLDER\n       nemo-jepo checkpoint verify CHECKPOINT"
RESTS = {
    "partial": "unfinished: being written, or its writer was killed",
    "deleted": "half deleted: being deleted, or what deleted it was killed",
}


def main(argv: Sequence[str]) -> int:
    """`nemo-jepo checkpoint`; see the head of this file."""
    commands = {"list": list_checkpoints, "verify": verify_checkpoint}
    if argv[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return DONE
    if len(argv) != 2 or argv[0] not in commands:
        print(USAGE, file=sys.stderr)
        return BAD_SETTINGS
    return commands[argv[0]](Path(argv[1]))


def list_checkpoints(run_folder: Path) -> int:
    """Print one line for each checkpoint of a run, oldest first, and for what killed runs left.

    Raises:
        ConfigError: the folder has no checkpoints folder.
    """
    folder = run_folder / "checkpoints"
    if not folder.is_dir():
        raise ConfigError("RUN_FOLDER", str(run_folder), "has no folder named checkpoints", "Give a run's folder")
    faults = {path: _fault_of(path) for path in checkpoints_in(folder)}
    for path, fault in faults.items():
        print(f"{path.name}  {_size(path):>9}  {_date(path)}  {fault or 'whole'}")
    for path in rests_in(folder):
        step = path.name.split(".")[1]
        print(f"{step}  {_size(path):>9}  {_date(path)}  {RESTS[path.suffix[1:]]}")
    if not faults:
        print(f"{folder}: no checkpoint yet")
    return FAILED if any(faults.values()) else DONE


def _fault_of(path: Path) -> str | None:
    """As fault_of; one that cannot be read is a fault here."""
    try:
        return fault_of(path)
    except ConfigError as error:
        return str(error)


def verify_checkpoint(checkpoint: Path) -> int:
    """Read a checkpoint again and print whether it is whole, or its first broken file.

    Raises:
        ConfigError: no such folder.
    """
    if not checkpoint.is_dir():
        raise ConfigError("CHECKPOINT", str(checkpoint), "no such folder", "Give a checkpoints/step_* folder")
    fault = broken_file(checkpoint)
    if fault is not None:
        print(f"{checkpoint}: {fault}")
        return FAILED
    marker = read_marker(checkpoint)
    read = "every byte is as it was written" if marker.checksums else "sizes are right; it has no checksums"
    print(f"{checkpoint}: whole, {len(marker.sizes)} files, {_size(checkpoint)}, {read}")
    return DONE


def _size(path: Path) -> str:
    num_bytes = float(sum(_bytes_of(file) for file in path.rglob("*")))
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} TiB"


def _bytes_of(file: Path) -> int:
    try:
        return file.stat().st_size if file.is_file() else 0
    except OSError:
        return 0  # it went meanwhile


def _date(path: Path) -> str:
    """When it was finished; of an unfinished one, when it last got a file."""
    file = path / MARKER
    try:
        changed = (file if file.exists() else path).stat().st_mtime
    except OSError:
        return "-" * 19  # it went meanwhile
    return datetime.fromtimestamp(changed).strftime("%Y-%m-%d %H:%M:%S")
