"""What lies in a run's checkpoints folder: which checkpoints are whole, what breaks the others. No torch here.

    nemo-jepo checkpoint list RUN_FOLDER      every checkpoint: whole or what is missing, size, date
    nemo-jepo checkpoint verify CHECKPOINT    reads every byte again and names the first broken file

Exit code 0 when all is whole, 1 when something is not, 2 for a wrong command line.
"""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.utils.exit_codes import BAD_SETTINGS, DONE, FAILED
from nemo_jepo.utils.files import sha256_of, write_atomically

MARKER = "complete.json"
USAGE = "usage: nemo-jepo checkpoint list RUN_FOLDER\n       nemo-jepo checkpoint verify CHECKPOINT"


# ---- which are whole ------------------------------------------------------------------------------------------


def checkpoints_in(folder: Path) -> list[Path]:
    """Every finished step_* folder, whole or not, oldest first."""
    found = (path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name))
    return sorted(found, key=step_of)


def whole_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in a run's checkpoints folder, oldest first."""
    return [path for path in checkpoints_in(folder) if fault_of(path) is None]


def step_of(checkpoint: Path) -> int:
    """Optimizer steps in a checkpoint, by its name."""
    return int(checkpoint.name.removeprefix("step_"))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, None without one. A broken `latest` is passed over."""
    checkpoints = whole_checkpoints(folder)
    return checkpoints[-1] if checkpoints else None


def is_checkpoint(path: Path) -> bool:
    """True for a folder that this program wrote as a checkpoint, whole or not."""
    return (path / MARKER).exists() or (path / ".metadata").exists()


def require_whole(path: Path) -> None:
    """Raise ConfigError, naming what is missing, unless the folder is a complete checkpoint."""
    fault = fault_of(path)
    if fault is not None:
        raise ConfigError("checkpoint", str(path), fault, "Use another checkpoint")


def fault_of(path: Path) -> str | None:
    """What keeps a folder from being a whole checkpoint, as far as names and sizes tell; None when it is one."""
    try:
        sizes = _marker(path)["files"]
    except (OSError, ValueError, KeyError):
        return f"has no readable {MARKER}: it was never finished"
    for name, size in sizes.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{name} is missing or has another size than when it was written"
    return None


def broken_file(path: Path) -> str | None:
    """The first file of a checkpoint whose bytes are not those that were written, and why; None when all are.

    Reads every byte. A checkpoint from before there were checksums is judged by its sizes alone.
    """
    fault = fault_of(path)
    if fault is not None:
        return fault
    for name, expected in _marker(path).get("sha256", {}).items():
        if sha256_of(path / name) != expected:
            return f"{name} holds other bytes than when it was written (sha256)"
    return None


# ---- how one becomes whole ------------------------------------------------------------------------------------


def note_checksums(folder: Path, rank: int, files: Iterable[Path]) -> None:
    """Leave the checksums of one rank's files for `mark_complete`, so that no rank reads another's."""
    checksums = {file.name: sha256_of(file) for file in files}
    write_atomically(folder / f"sha256_{rank}.json", json.dumps(checksums))


def mark_complete(folder: Path, step: int) -> None:
    """Write the marker, with name, size and checksum of every file: the last thing that happens to a checkpoint."""
    checksums: dict[str, str] = {}
    for note in sorted(folder.glob("sha256_*.json")):
        checksums |= json.loads(note.read_text())
        note.unlink()
    sizes: dict[str, int] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        sizes[name] = file.stat().st_size
        if name not in checksums:
            checksums[name] = sha256_of(file)
    write_atomically(folder / MARKER, json.dumps({"step": step, "files": sizes, "sha256": checksums}, indent=1))


def _marker(path: Path) -> dict[str, Any]:
    return json.loads((path / MARKER).read_text())


# ---- nemo-jepo checkpoint -------------------------------------------------------------------------------------


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
    """Print one line for each checkpoint of a run, oldest first.

    Raises:
        ConfigError: the folder has no checkpoints folder.
    """
    folder = run_folder / "checkpoints"
    if not folder.is_dir():
        raise ConfigError("RUN_FOLDER", str(run_folder), "has no folder named checkpoints", "Give a run's folder")
    faults = {path: fault_of(path) for path in checkpoints_in(folder)}
    for path, fault in faults.items():
        print(f"{path.name}  {_size(path):>9}  {_date(path)}  {fault or 'whole'}")
    for path in sorted(folder.glob(".step_*.partial")):
        step = path.name.split(".")[1]
        print(f"{step}  {_size(path):>9}  {_date(path)}  unfinished: being written, or its writer was killed")
    if not faults:
        print(f"{folder}: no checkpoint yet")
    return FAILED if any(faults.values()) else DONE


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
    marker = _marker(checkpoint)
    read = "every byte is as it was written" if "sha256" in marker else "sizes are right; it has no checksums"
    print(f"{checkpoint}: whole, {len(marker['files'])} files, {_size(checkpoint)}, {read}")
    return DONE


def _size(path: Path) -> str:
    num_bytes = float(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()))
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} TiB"


def _date(path: Path) -> str:
    """When it was finished; of an unfinished one, when it last got a file."""
    file = path / MARKER
    changed = (file if file.exists() else path).stat().st_mtime
    return datetime.fromtimestamp(changed).strftime("%Y-%m-%d %H:%M:%S")
