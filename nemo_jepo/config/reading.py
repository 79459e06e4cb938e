"""Files of a user, read so that whatever is wrong with one is one line: which file, what is wrong, what to do.

Only regular files of a size that makes sense are opened: a FIFO or a device would block, and a size without limit would
fill the memory. What a library raises over a file becomes such a line as well (`library`). A model's folder may not
lead out of itself by `..`, by an absolute path or by a link; the links of the Hugging Face hub's cache lead into its
own blobs, and are followed.
"""

import errno
import json
import os
import stat
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_jepo.config.errors import ConfigError, DataError, RunError, one_line

MIB = 2**20
SMALL_FILE = 4 * MIB
"""Bytes: the most of a config.json, a chat template and the like. The largest that are published have some 100 kB."""
LARGE_FILE = 64 * MIB
"""Bytes: the most of a tokenizer's files and of an index of weights. The largest that are published have 35 MB."""
LARGE_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "model.safetensors.index.json")
READ_BY_LIBRARIES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".safetensors")
"""How the names of files end that transformers and vLLM open in a model's folder, whether asked for or not."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
READ_ONLY = (errno.EROFS,)
COPY_AGAIN = "Copy the file again"
KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a FIFO",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


def reason(error: BaseException) -> str:
    """What an error says: the system's own words for a fault of the system, else the last line of its text."""
    if isinstance(error, OSError) and isinstance(error.errno, int):
        return os.strerror(error.errno)
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else ""
    return text[:200] if text and not isinstance(error, KeyError) else f"{type(error).__name__} {text[:200]}".strip()


def line_of(error: OSError | MemoryError) -> str:
    """One line for a fault of the system that nobody nearer to it has answered: what, where, reading or writing, what
    to do."""
    where = error.filename2 or error.filename if isinstance(error, OSError) else None
    subject = "the system" if where is None else os.fsdecode(where) if isinstance(where, (str, bytes)) else str(where)
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = next((name for name in reversed(frames) if name.startswith("nemo_jepo.")), "nemo_jepo")
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError):
        rule, fix = "the memory of this machine is used up", "Use smaller batches or a larger machine"
    elif number in FULL:
        rule, fix = "cannot be written", "Make room there, or give another place"
    elif number == errno.EPIPE:
        rule, fix = "cannot be written", "Whoever read it has ended"
    elif number in READ_ONLY:
        rule, fix = "cannot be written", "Give a place that you may write to"
    elif isinstance(error, (ConnectionError, TimeoutError)):
        rule, fix = "cannot be reached", "Look whether it runs, and at the network"
    else:
        rule, fix = "cannot be read or written", "Look whether it is there and what you may do with it"
    why = "" if isinstance(error, MemoryError) else f" ({reason(error)})"
    return one_line(f"{subject}: {rule}{why}, in {ours}. {fix}.")


def unusable(path: str | Path, limit: int | None = None) -> tuple[str, str] | None:
    """Why a path cannot be read as a file, and what to do; None for a regular file.

    Args:
        limit: bytes, the most that the file may hold.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        return f"cannot be read ({reason(error)})", "Give the path of a file that you may read"
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for is_kind, name in KINDS.items() if is_kind(found.st_mode)), "something else")
        return f"is {kind}, and only a regular file is read", "Put the file itself there"
    if limit is not None and found.st_size > limit:
        rule = f"holds {found.st_size:,} bytes, and no such file has more than {limit:,}"
        return rule, "Look at what it is"
    return None


def require_file(key: str, path: str | Path, limit: int | None = None) -> None:
    """Raise ConfigError unless a regular file of at most `limit` bytes is there."""
    if (fault := unusable(path, limit)) is not None:
        raise ConfigError(key, str(path), *fault)


def read_file(key: str, path: str | Path, limit: int = SMALL_FILE) -> bytes:
    """What a file holds.

    Raises:
        ConfigError: no regular file, one of more than `limit` bytes, or one that cannot be read.
    """
    require_file(key, path, limit)
    try:
        with open(path, "rb") as file:
            return file.read(limit + 1)
    except (OSError, MemoryError) as error:
        raise ConfigError(key, str(path), f"cannot be read ({reason(error)})", COPY_AGAIN) from error


def read_json(key: str, path: str | Path, limit: int = SMALL_FILE) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        ConfigError: see `read_file`; or what the file holds is no JSON object.
    """
    content = read_file(key, path, limit)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(key, str(path), f"cannot be read ({reason(error)})", COPY_AGAIN) from error
    if not isinstance(found, dict):
        raise ConfigError(key, str(path), "cannot be read (it holds no JSON object)", COPY_AGAIN)
    return found


@contextmanager
def library(key: str, value: object, rule: str, fix: str) -> Iterator[None]:
    """What a library raises in this block over a user's file or text is a ConfigError, with its last line in brackets.

    Libraries check such things in many places, with many exceptions; those of Rust end in a PanicException, which is no
    Exception. Nothing but their calls belongs into the block. What this program says itself passes, and so does the end
    of whoever read the output.
    """
    try:
        yield
    except (ConfigError, DataError, RunError, BrokenPipeError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        raise ConfigError(key, value, f"{rule} ({reason(error)})", fix) from error


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"


@contextmanager
def held_stderr() -> Iterator[None]:
    """What this process writes to stderr in the block appears behind it, or not at all where Rust has panicked: it
    prints lines of its own beside what it raises."""
    kept, said, panicked = os.dup(2), os.memfd_create("stderr"), False
    os.dup2(said, 2)
    try:
        yield
    except BaseException as error:
        panicked = _is_panic(error)
        raise
    finally:
        os.dup2(kept, 2)
        os.lseek(said, 0, os.SEEK_SET)
        while not panicked and (part := os.read(said, MIB)):
            os.write(2, part)
        os.close(kept)
        os.close(said)


def require_model_files(key: str, folder: str | Path) -> None:
    """What libraries would open in a model's folder are regular files of it, of sizes that make sense.

    Raises:
        ConfigError: names the first file that is something else, or whose link leads out of the folder.
    """
    path = Path(folder)
    try:
        inside = [path, *(it for it in (path / "additional_chat_templates",) if it.is_dir())]
        files = [file for place in inside for file in sorted(place.iterdir()) if file.suffix in READ_BY_LIBRARIES]
    except (OSError, ValueError) as error:
        raise ConfigError(key, str(folder), f"cannot be read ({reason(error)})", "Give a model's folder") from error
    for file in files:
        require_inside(key, path, file)
        require_file(key, file, size_limit(file))


def size_limit(file: Path) -> int | None:
    """Bytes: the most that a file of this name holds with sense; None for weights."""
    if file.suffix == ".safetensors":
        return None
    return LARGE_FILE if file.name in LARGE_FILES or file.suffix in (".model", ".tiktoken") else SMALL_FILE


def require_inside(key: str, folder: Path, file: Path) -> None:
    """Raise ConfigError for a file that lies, or whose link leads, outside of the folder.

    Args:
        folder: of a model; a snapshot of the hub's cache may hold links into the blobs of the same repository.
    """
    try:
        home, found = folder.resolve(), file.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a link that leads to itself is a RuntimeError
        raise ConfigError(key, str(file), f"cannot be read ({reason(error)})", "Put the file itself there") from error
    if not found.is_relative_to(home) and not found.is_relative_to(_blobs(home)):
        rule = f"lies outside of the folder, at {found}"
        raise ConfigError(key, str(file), rule, "Put the file itself into the folder")


def _blobs(home: Path) -> Path:
    """Where a snapshot of the hub's cache, models--OWNER--NAME/snapshots/COMMIT, has its files; else the folder."""
    repository = home.parent.parent
    is_snapshot = home.parent.name == "snapshots" and repository.name.startswith("models--")
    return repository / "blobs" if is_snapshot else home
