"""Files that are whole or not there, and what they hold."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

OTHER_BYTES = "holds other bytes than when it was written (sha256)"
"""What is wrong with a file whose checksum is another."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that holds all of the content or what it held before, whenever the process is killed.

    Text is written as UTF-8. The bytes are on the disk when this returns.
    """
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def hashing_threads() -> ThreadPoolExecutor:
    """Threads that compute checksums beside other work: this process's share of the cores (hashlib lets the GIL go)."""
    share = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return ThreadPoolExecutor(max(1, share), "sha256")


def sha256_of(path: str | Path) -> str:
    """Checksum of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
