"""What lies in a run's checkpoints folder: which checkpoints are whole, what breaks the others. No torch here.

    step_000040/complete.json     {"step": 40, "files": {name: bytes}, "sha256": {name: checksum}}; written last
    .step_000040.0a1b2c3d.partial     being written, or its writer was killed
    .step_000040.0a1b2c3d.deleted     being deleted, or what deleted it was killed

A checkpoint is renamed to what it is when nothing of it is missing, and renamed before anything of it is deleted.
"""

import json
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.reading import reason
from nemo_jepo.utils.files import OTHER_BYTES, sha256_of, write_atomically

MARKER = "complete.json"
NEEDED = (".metadata", "metadata.json", "common.pt", "loop.json")
"""Files without which nothing can be loaded, whatever the marker says."""
MARKER_BYTES = 256 * 2**20
"""More than any marker has: a line of 200 bytes for each file of a million."""
RETRIES_S = (0.5, 1.0, 2.0)
"""Pauses before a read that failed is tried again: shared file systems have moments."""
REST = re.compile(r"\.step_\d+\.[0-9a-f]+\.(partial|deleted)")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Marker:
    """What complete.json says."""

    step: int
    sizes: dict[str, int]
    """Bytes of every file, by its path in the folder."""
    checksums: dict[str, str]
    """SHA-256 of each of them, in hexadecimal; empty in a checkpoint from before there were checksums."""


# ---- which are whole ------------------------------------------------------------------------------------------


def checkpoints_in(folder: Path) -> list[Path]:
    """Every finished step_* folder, whole or not, oldest first; none where there is no such folder.

    Raises:
        ConfigError: the folder cannot be read.
    """
    try:
        names = _again(folder, lambda: [path.name for path in folder.iterdir()])
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((folder / name for name in names if re.fullmatch(r"step_\d+", name)), key=step_of)


def whole_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in a run's checkpoints folder, oldest first."""
    return [path for path in checkpoints_in(folder) if fault_of(path) is None]


def step_of(checkpoint: Path) -> int:
    """Optimizer steps in a checkpoint, by its name."""
    return int(checkpoint.name.removeprefix("step_"))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; None where there is none at all, whole or not.

    Raises:
        ConfigError: there are some and none is whole, or one cannot be read: a run that began anew would overwrite it.
    """
    faults: list[str] = []
    for path in reversed(checkpoints_in(folder)):
        fault = fault_of(path)
        if fault is None:
            return path
        faults.append(f"{path.name} {fault}")
    if faults:
        fix = "Put back what is missing, or move that folder away to begin at step 0"
        raise ConfigError("checkpoints", str(folder), f"none is whole: {'; '.join(faults)}", fix)
    return None


def passed_over(folder: Path) -> list[str]:
    """A line for each checkpoint that is newer than the newest whole one, and why it is not whole."""
    lines: list[str] = []
    for path in reversed(checkpoints_in(folder)):
        fault = fault_of(path)
        if fault is None:
            break
        lines.append(f"{path} is passed over, although it is the newer one: {fault}")
    return lines


def is_checkpoint(path: Path) -> bool:
    """True for a folder that this program wrote as a checkpoint, whole or not."""
    return (path / MARKER).exists() or (path / ".metadata").exists()


def require_whole(path: Path) -> Marker:
    """What a complete checkpoint's marker says.

    Raises:
        ConfigError: the folder is none; names what is missing.
    """
    fault = fault_of(path)
    if fault is not None:
        raise ConfigError("checkpoint", str(path), fault, "Use another checkpoint")
    return read_marker(path)


def fault_of(path: Path) -> str | None:
    """What keeps a folder from being a whole checkpoint, as far as names and sizes tell; None when it is one.

    Raises:
        ConfigError: the disk does not tell, also when asked again.
    """
    try:
        marker = read_marker(path)
    except (FileNotFoundError, NotADirectoryError):
        return f"has no {MARKER}: it was never finished"
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        return f"has no readable {MARKER} ({error})"
    for name, size in marker.sizes.items():
        if _size_of(path / name) != size:
            return f"{name} is missing or has another size than when it was written"
    return None


def broken_file(path: Path) -> str | None:
    """The first file of a checkpoint whose bytes are not those that were written, and why; None when all are.

    Reads every byte. A checkpoint from before there were checksums is judged by its sizes alone.
    """
    fault = fault_of(path)
    if fault is not None:
        return fault
    for name, expected in read_marker(path).checksums.items():
        if sha256_of(path / name) != expected:
            return f"{name} {OTHER_BYTES}"
    return None


def read_marker(path: Path) -> Marker:
    """What complete.json says.

    Raises:
        FileNotFoundError: there is none.
        ValueError: what is wrong with it.
        ConfigError: the disk does not tell, also when asked again.
    """
    file = path / MARKER
    if not 0 < (_size_of(file, missing=0) or 1) <= MARKER_BYTES:
        raise ValueError(f"more than {MARKER_BYTES} bytes")
    text = _again(file, file.read_bytes)
    try:
        held = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("not JSON") from error
    if not isinstance(held, dict) or not {"step", "files"} <= held.keys() <= {"step", "files", "sha256"}:
        raise ValueError("other keys than step, files and sha256")
    marker = Marker(held["step"], held["files"], held.get("sha256", {}))
    _check_marker(marker, has_checksums="sha256" in held)
    if re.fullmatch(r"step_\d+", path.name) and step_of(path) != marker.step:
        raise ValueError(f"of step {marker.step}")
    return marker


def _check_marker(marker: Marker, has_checksums: bool) -> None:
    """Raise ValueError unless it is what `mark_complete` writes: numbers, and names inside of the folder."""
    if type(marker.step) is not int or marker.step < 0:
        raise ValueError("step is no number of steps")
    if not isinstance(marker.sizes, dict) or not all(type(size) is int and size >= 0 for size in marker.sizes.values()):
        raise ValueError("files are not names with their sizes")
    for name in marker.sizes:
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts or "\0" in name:
            raise ValueError(f"{name!r} is outside of the folder")
    for name in NEEDED:
        if name not in marker.sizes:
            raise ValueError(f"without {name}")
    if has_checksums and (not isinstance(marker.checksums, dict) or marker.checksums.keys() != marker.sizes.keys()):
        raise ValueError("checksums of other files than it lists")


def _size_of(file: Path, missing: int | None = None) -> int | None:
    """Bytes of a regular file; `missing` where there is no such file."""
    try:
        return _again(file, file.stat).st_size if _again(file, file.is_file) else missing
    except (FileNotFoundError, NotADirectoryError):
        return missing


def _again(path: Path, read: Callable[[], Result]) -> Result:
    """What `read` gives; tried again where the disk fails, but not where there is no such file.

    Raises:
        ConfigError: it failed each time.
    """
    for pause_s in (*RETRIES_S, None):
        try:
            return read()
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            if pause_s is None:
                rule = f"cannot be read ({reason(error)}), after {len(RETRIES_S) + 1} attempts"
                raise ConfigError("checkpoint", str(path), rule, "Look after the disk, and start again") from error
            time.sleep(pause_s)
    raise AssertionError("the last attempt returns or raises")


# ---- how one becomes whole, and how one goes ------------------------------------------------------------------


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
    marker: dict[str, Any] = {"step": step, "files": sizes, "sha256": checksums}
    write_atomically(folder / MARKER, json.dumps(marker, indent=1))


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint, so that none that is half deleted has its name; nothing where there is none."""
    rest = checkpoint.with_name(f".{checkpoint.name}.{secrets.token_hex(4)}.deleted")
    try:
        checkpoint.rename(rest)
    except FileNotFoundError:
        return
    shutil.rmtree(rest, ignore_errors=True)  # `sweep` tries again


def rests_in(folder: Path) -> list[Path]:
    """What killed runs left half written or half deleted, or what is being written now."""
    return sorted(path for path in folder.glob(".step_*") if REST.fullmatch(path.name))


def sweep(folder: Path) -> list[Path]:
    """Delete what killed runs left, and say what; no run may be at work in the folder."""
    rests = rests_in(folder)
    for rest in rests:
        shutil.rmtree(rest, ignore_errors=True)
    return rests
