"""A run of several ranks in which one is stuck says which and where, and ends, instead of waiting half an hour.

Every rank has two threads: one tells the group's store every few seconds that it lives and where its main thread is,
and reads what others tell; one judges what was read (`stuck`), since a store whose host is stopped does not answer.
Rank 0 watches all ranks, the others watch rank 0 and the store. Who finds a rank stuck names it on stderr, leaves a
note for the others, and ends its process with FAILED: the launcher ends the job, as when a rank dies.
"""

import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from types import TracebackType

import torch.distributed as dist

from nemo_jepo.actor.stuck import SHOWN_FRAMES, Seen, not_going_on, silent
from nemo_jepo.utils import phases
from nemo_jepo.utils.exit_codes import FAILED

NOTE = "stuck"
_starts = itertools.count()


def heartbeat(timeout_s: float | None) -> AbstractContextManager[None]:
    """Watches the ranks of this world while the block runs; all ranks enter, after init_distributed.

    Args:
        timeout_s: trainer.stuck_timeout_s; None, and a single rank, watch nothing.
    """
    if timeout_s is None or dist.get_world_size() == 1:
        return nullcontext()
    return Heartbeat(timeout_s)


class Heartbeat(AbstractContextManager[None]):
    """See `heartbeat`."""

    def __init__(self, timeout_s: float) -> None:
        self._rank = dist.get_rank()
        self._timeout_s, self._interval_s = timeout_s, min(5.0, timeout_s / 20)
        self._address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives a start
        self._prefix = f"heartbeat/{start}/{next(_starts)}"
        self._store: dist.Store | None = self._connect()
        self._clock = RunningClock(2 * self._interval_s)
        watched = range(dist.get_world_size()) if self._rank == 0 else [0]
        self._book = Book(self._clock, watched)
        self._missing, self._keys = [str(rank) for rank in watched], list[str]()
        self._num_beats, self._answered = 0, self._clock.seconds
        self._note: bytes = b""
        self._ended: str | None = None
        self._stop = threading.Event()

    def __enter__(self) -> None:
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._exchange, self._judge)]
        for thread in self._threads:
            thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The last beat says how it ended; after an error it is a rank that others may wait for."""
        self._ended = "ended" if kind is None else f"failed with {kind.__name__}"
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * self._interval_s + 1)  # not for ever: the store may be gone

    # ---- the thread that talks to the store

    def _connect(self) -> dist.Store:
        """A client of its own: the default store's may be held by the main thread."""
        client = dist.TCPStore(*self._address, wait_for_workers=False, timeout=timedelta(seconds=10))
        client.set_timeout(timedelta(seconds=2 * self._timeout_s))  # the judge does not wait for an answer
        return dist.PrefixStore(self._prefix, client)

    def _exchange(self) -> None:
        while not self._ended:
            try:
                self._store = self._connect() if self._store is None else self._store
                self._talk(self._store)
            except dist.DistError:
                self._store = None  # it has gone, or the connection: the judge counts, and the next round connects
            self._stop.wait(self._interval_s)
        if self._store is not None:
            with suppress(dist.DistError):
                self._tell(self._store)

    def _talk(self, store: dist.Store) -> None:
        """Tell, and read."""
        self._tell(store)
        self._keys += [key for key in self._missing if store.check([key])]
        self._missing = [key for key in self._missing if key not in self._keys]
        for value in store.multi_get(self._keys) if self._keys else ():
            self._book.write(value)
        self._answered = self._clock.seconds
        if store.check([NOTE]):
            self._note = store.get(NOTE)

    def _tell(self, store: dist.Store) -> None:
        phase, self._num_beats = phases.current(), self._num_beats + 1
        beat = {
            "beat": self._num_beats,
            "rank": self._rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "phase": self._ended or phase.name,
            "number": phase.number,
            "usual_s": phase.usual_s,
            "stack": main_stack(),
            "ended": self._ended == "ended",
        }
        store.set(str(self._rank), json.dumps(beat))

    # ---- the thread that judges

    def _judge(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._clock.tick()
            block = self._finding()
            if block is not None and not self._stop.is_set():
                self._end(block)

    def _finding(self) -> str | None:
        """What is said of the stuck ranks; None while all is well."""
        if self._note:
            return f"rank {self._rank} ends, for {self._note.decode()}"
        # Heard so much earlier than the timeout that it is named before it: a beat, its reading and a look lie between.
        limit_s = self._timeout_s - 3 * self._interval_s
        ranks = [seen for seen in self._book.ranks() if seen.rank != self._rank]
        lines = [seen.shown(f"no sign of life for {seen.silent_s:.0f} s") for seen in silent(ranks, limit_s)]
        unanswered_s = self._clock.seconds - self._answered
        if not lines and unanswered_s >= limit_s and not any(seen.ended for seen in ranks):
            store = f"the store at {':'.join(map(str, self._address))} has not answered for {unanswered_s:.0f} s"
            lines = [seen.shown(store) for seen in ranks if seen.rank == 0] or [store]
        if not lines and self._rank == 0:
            behind = not_going_on(self._book.ranks(), self._timeout_s)
            lines = [seen.shown(f"no rank has gone on for {seen.in_phase_s:.0f} s") for seen in behind]
        if self._rank > 1:  # rank 1 shows the stacks
            lines = [line.partition("\n")[0] for line in lines]
        return "\n".join(lines) or None

    def _end(self, block: str) -> None:
        """Say it, tell the others, and end this process, whose main thread cannot be woken."""
        end = f"rank {self._rank} ends the job (exit code {FAILED}); started again, it goes on from its last checkpoint"
        os.write(2, f"{block}\n{end}\n".encode())
        if not self._note and self._store is not None:
            writing = threading.Thread(target=_leave_note, args=(self._store, block), daemon=True)
            writing.start()
            writing.join(self._interval_s)  # a store that does not answer holds it
            time.sleep(2 * self._interval_s)  # the others read the note: the store may be this process's
        os._exit(FAILED)


def _leave_note(store: dist.Store, block: str) -> None:
    store.set(NOTE, block.partition("\n")[0])


class RunningClock:
    """Seconds that this process has run. It stands still while the process is stopped, and so cannot say who was.

    Args:
        longest_s: what one tick counts at most.
    """

    def __init__(self, longest_s: float) -> None:
        self._longest_s, self._last, self.seconds = longest_s, time.monotonic(), 0.0

    def tick(self) -> None:
        """Count what has passed; called by one thread, more often than every `longest_s`."""
        now = time.monotonic()
        self.seconds += min(now - self._last, self._longest_s)
        self._last = now


@dataclass(frozen=True, slots=True)
class _Heard:
    """A rank's last beat, and when something of it last changed."""

    beat: int
    seen: Seen
    at: float
    in_phase_since: float
    unmoved_since: float


class Book:
    """What was heard of each rank, and when by the observer's clock: clocks of two hosts are never compared."""

    def __init__(self, clock: RunningClock, ranks: Iterable[int]) -> None:
        self._clock, now = clock, clock.seconds
        self._heard = {rank: _Heard(0, _unknown(rank), now, now, now) for rank in ranks}

    def write(self, value: bytes) -> None:
        """Take in a rank's beat, which may be one that is known already."""
        record, now = json.loads(value), self._clock.seconds
        beat, seen = record.pop("beat"), Seen(**record | {"stack": tuple(record["stack"])})
        before = self._heard[seen.rank]
        if before.beat != beat:
            in_phase_since = before.in_phase_since if before.seen.number == seen.number else now
            unmoved_since = before.unmoved_since if before.seen == seen else now
            self._heard[seen.rank] = _Heard(beat, seen, now, in_phase_since, unmoved_since)

    def ranks(self) -> list[Seen]:
        """All of them, by rank, with the seconds until now; one that was never heard is silent from the beginning."""
        now = self._clock.seconds
        return [
            replace(
                heard.seen,
                silent_s=now - heard.at,
                in_phase_s=now - heard.in_phase_since,
                unmoved_s=now - heard.unmoved_since,
            )
            for _, heard in sorted(self._heard.copy().items())
        ]


def _unknown(rank: int) -> Seen:
    return Seen(rank=rank, host="unknown", pid=0, phase="before its first sign of life", number=-1, usual_s=None)


def main_stack() -> list[str]:
    """Where the main thread is: the innermost frames, outermost first, as path:line in function."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    lines: list[str] = []
    while frame is not None and len(lines) < SHOWN_FRAMES:
        path = "/".join(frame.f_code.co_filename.split("/")[-4:])
        lines.append(f"{path}:{frame.f_lineno} in {frame.f_code.co_name}")
        frame = frame.f_back
    return lines[::-1]
