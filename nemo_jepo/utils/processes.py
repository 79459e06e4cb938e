"""Processes that end together and leave nothing behind (Linux).

die_with_parent   in a child: the kernel ends it when its parent ends, however that happens
held_back         children started inside never see these signals, unless they ask for them
end_session       from outside: every process of a session, by SIGKILL
SharedMemory      what a session's processes hold in /dev/shm, so that it can be removed after them
private_folder    for their temporary files and sockets, removed after them, if need be by the next one that is made
"""

import ctypes
import fcntl
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_SHARED_MEMORY = "/dev/shm/"
_FOLDER, _RANDOM = "nemo_jepo_serve_", "????????"
_LONGEST_FOLDER = 70
"""Bytes. A Unix socket's path has 107 at most, and the name of one of vLLM's has 36."""


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have this process receive a signal when the thread that started it ends.

    Where the parent ended before this call, the signal comes at once. Survives exec, not fork.
    """
    parent = multiprocessing.parent_process()
    expected = os.getppid() if parent is None else parent.pid
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != expected:
        os.kill(os.getpid(), number)


@contextmanager
def held_back(signals: Iterable[signal.Signals]) -> Iterator[None]:
    """Signals wait that come to this thread meanwhile; in children that start here they wait until these unblock them.

    Slurm and terminals send to all processes what is meant for a run, and a child dies of it while it starts.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def session_members(session: int) -> Iterator[int]:
    """Ids of the living processes of a session."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it ended meanwhile
            if int(fields[3]) == session and fields[0] != "Z":
                yield int(entry.name)


def end_session(session: int, patience_s: float = 20.0) -> None:
    """Kill every process of a session and wait until they are gone; a large one takes a while."""
    deadline = time.monotonic() + patience_s
    while (members := list(session_members(session))) and time.monotonic() < deadline:
        for pid in members:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)


class SharedMemory:
    """Files in /dev/shm of a session's processes: those they had mapped when last looked at, and their semaphores.

    A killed process cannot remove its own, and vLLM's hold hundreds of megabytes.
    """

    def __init__(self, session: int) -> None:
        self._session = session
        self._members: set[int] = set()
        self._files: set[Path] = set()
        self._present: set[str] = set()
        self._num_alike = 0

    def look(self) -> None:
        """Note what is mapped now; look again while the processes live.

        Costs little while /dev/shm stays as it is: a new file is looked for twice, for it may not be mapped at once.
        """
        present = set(os.listdir(_SHARED_MEMORY))
        self._num_alike = self._num_alike + 1 if present == self._present else 0
        self._present = present
        if self._num_alike > 1:
            return
        for pid in session_members(self._session):
            self._members.add(pid)
            self._files |= _mapped(pid)

    def remove(self) -> None:
        """Remove what was noted, except what a living process still maps; call it when the session has ended."""
        for pid in self._members:  # loky's semaphores are mapped under a name that is gone, but bear the id
            self._files |= set(Path(_SHARED_MEMORY).glob(f"sem.*-{pid}-*"))
        living = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal())
        still = {file for pid in living for file in _mapped(pid)}
        for file in self._files - still:
            file.unlink(missing_ok=True)


def _mapped(pid: int) -> set[Path]:
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    paths = (line.split(maxsplit=5)[5] for line in lines if _SHARED_MEMORY in line)
    return {Path(path) for path in paths if path.startswith(_SHARED_MEMORY) and not path.endswith(" (deleted)")}


@contextmanager
def private_folder() -> Iterator[Path]:
    """A temporary folder that only this user can enter; gone afterwards.

    Its owner holds a lock on it. Folders that nobody holds were left by processes that were killed; they go first.
    """
    place = Path(tempfile.gettempdir())
    if len(os.fsencode(place / f"{_FOLDER}{_RANDOM}")) > _LONGEST_FOLDER:
        place = Path("/tmp")
    for left in place.glob(f"{_FOLDER}{_RANDOM}"):
        _remove_if_nobody_holds(left)
    folder, lock = _new_folder(place)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _new_folder(place: Path) -> tuple[Path, int]:
    """One with its lock; a process that looks for those that are left may have taken it before it was locked."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_FOLDER, dir=place))
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            continue
        except BlockingIOError:
            os.close(lock)
            continue
        except OSError:
            return folder, lock  # a file system without locks: a folder that is left there stays
        if folder.exists():
            return folder, lock
        os.close(lock)


def _remove_if_nobody_holds(folder: Path) -> None:
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return  # gone, or not a folder, or another user's
    try:
        if os.fstat(lock).st_uid == os.getuid():
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass  # somebody holds it
    finally:
        os.close(lock)
