"""One run, one folder: a second run in a folder is told who is at work there.

    <run>/run.lock    {"host": ..., "pid": ..., "job": Slurm's id, "since": ...} while a run is at work, else empty

Rank 0 holds flock(2) on the file: the kernel gives it back however the run ends, kill -9 included. File systems do not
all carry the lock from node to node, and some have none, so the holder also touches the file every few seconds. Who
finds the lock free and the holder of another node named in it waits until it is clear that nobody touches it.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from nemo_jepo.actor.parallel import on_first_rank
from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.reading import reason

log = logging.getLogger(__name__)

LOCK = "run.lock"
BEAT_S = 5.0
"""How often the holder touches the file."""
SILENT_S = 45.0
"""A holder on another node that has not touched the file for so long is gone."""
HANDOVER_S = 60.0
"""How long a job that Slurm started again waits for its former processes."""
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_BUSY = (errno.EAGAIN, errno.EACCES)
_held: set[int] = set()


def _leave_to_parent() -> None:
    """In a forked child, which would keep the lock when its parent is killed."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Make a run's folder, and be the only run in it; all ranks.

    Raises:
        ConfigError: on every rank; another run is at work there, or the folder cannot be made or written.
    """
    lock: list[_Lock] = []
    on_first_rank(lambda: lock.append(_Lock(folder)))
    try:
        yield
    finally:
        for held in lock:
            held.release()


class _Lock:
    """The lock of a run's folder, held from here on."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / LOCK
        self._descriptor = self._open(folder)
        try:
            self._wait_for_it()
            self._write(_ourselves())
        except BaseException:
            self._close()
            raise
        self._done = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._beats.start()

    def release(self) -> None:
        """Somebody else may have it."""
        self._done.set()
        self._beats.join()
        try:
            os.ftruncate(self._descriptor, 0)
        except OSError:
            pass  # the next run waits until it is clear that nobody touches the file
        self._close()

    def _open(self, folder: Path) -> int:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except (OSError, ValueError) as error:
            rule = f"the run's folder cannot be written ({reason(error)})"
            raise ConfigError(
                "exp_manager.exp_dir", str(folder), rule, "Choose a folder that this user may write in"
            ) from error
        _held.add(descriptor)
        return descriptor

    def _close(self) -> None:
        _held.discard(self._descriptor)
        os.close(self._descriptor)

    def _wait_for_it(self) -> None:
        """Return when the lock is ours; ConfigError where another run holds it."""
        began = time.monotonic()
        while not self._try_it():
            holder = self._holder()
            waits = _is_our_job(holder) and time.monotonic() - began < HANDOVER_S
            if not waits:
                raise self._taken(holder)
            time.sleep(0.2)
        holder = self._holder()
        if holder and self._is_alive(holder):
            raise self._taken(holder)

    def _try_it(self) -> bool:
        """Whether the kernel gives the lock; True also where the file system has no locks."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _BUSY:
                return False
            if error.errno not in _NO_LOCKS:
                raise ConfigError(
                    "exp_manager.exp_dir",
                    str(self._file),
                    f"cannot be locked ({reason(error)})",
                    "Use another file system",
                ) from error
            self._has_locks = False
        else:
            self._has_locks = True
        return True

    def _is_alive(self, holder: Mapping[str, Any]) -> bool:
        """Whether a holder that the kernel's lock says nothing of is at work."""
        if holder.get("host") == socket.gethostname():
            return not self._has_locks and _is_running(holder)
        if _is_our_job(holder):
            return False  # Slurm starts a job again when its former processes are gone
        told = "%s was not given back by process %s on %s: waiting %.0f s to see whether it is at work"
        log.warning(told, self._file, holder.get("pid"), holder.get("host"), SILENT_S)
        touched, deadline = self._touched(), time.monotonic() + SILENT_S
        while time.monotonic() < deadline:
            time.sleep(min(1.0, SILENT_S / 4))
            if self._touched() != touched:
                return True
        return False

    def _touched(self) -> int:
        return os.stat(self._file).st_mtime_ns

    def _holder(self) -> dict[str, Any]:
        """What the file says; {} where it says nothing that can be read."""
        try:
            held = json.loads(os.pread(self._descriptor, 4096, 0) or b"{}")
        except (OSError, ValueError, RecursionError):
            return {}
        return held if isinstance(held, dict) else {}

    def _write(self, holder: Mapping[str, Any]) -> None:
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)

    def _beat(self) -> None:
        while not self._done.wait(BEAT_S):
            try:
                os.utime(self._descriptor)
            except OSError:
                continue  # the disk has a moment

    def _taken(self, holder: Mapping[str, Any]) -> ConfigError:
        job = f", Slurm job {holder['job']}" if holder.get("job") else ""
        who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}{job}, since {holder.get('since', '?')}"
        fix = "Wait for it, stop it, or choose another exp_manager.name"
        return ConfigError(
            "exp_manager.name", str(self._file.parent), f"another run is at work in this folder: {who}", fix
        )


def _ourselves() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "since": datetime.now().strftime("%Y-%m-%d %H:%M:%S"),
    }


def _is_our_job(holder: Mapping[str, Any]) -> bool:
    """Whether the holder is an earlier start of this Slurm job."""
    return bool(holder.get("job")) and holder["job"] == os.environ.get("SLURM_JOB_ID")


def _is_running(holder: Mapping[str, Any]) -> bool:
    """Whether a holder on this node lives; its id may be another process's by now."""
    try:
        return abs(psutil.Process(int(holder["pid"])).create_time() - float(holder["started"])) < 1
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False
