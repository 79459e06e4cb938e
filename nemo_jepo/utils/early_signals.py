"""Signals while a command starts: it ends at once, with one line, whatever it is doing.

    end_at(signals, line, code)     from here on
    release()                       not any more: they raise, or end the process, or do what was set meanwhile

Python runs a handler between two of its own instructions, and one of these may import a library or wait for other
ranks for minutes; and libraries swallow what a handler raises. So the part of the handler that is written in C wakes a
thread, which writes the line and ends the process. Its own servers end with it (`processes.die_with_parent`).
"""

import atexit
import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What tells a run to end: of a launcher, a terminal, a batch system."""


def end_at(signals: Sequence[signal.Signals], line: str, code: int) -> None:
    """End this process at the first of these signals; one that the process was started to ignore is ignored still.

    Call it in the main thread. At the process's end they are ignored, so that the exit code is the command's.
    """
    global _watch
    release()
    _watch = _Watch(signals, line, code)


def release() -> None:
    """Give the signals back; a handler that was set meanwhile stays."""
    global _watch
    if _watch is not None:
        _watch.close()
    _watch = None


class _Watch:
    def __init__(self, signals: Sequence[signal.Signals], line: str, code: int) -> None:
        self._signals, self._line, self._code, self._closed = signals, line, code, False
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._thread = threading.Thread(target=self._wait, args=(reader,), daemon=True)
        self._thread.start()
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        heeded = [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]
        self._before: dict[int, Any] = {int(number): signal.signal(number, self._heard) for number in heeded}
        os.register_at_fork(after_in_child=self._leave_to_parent)
        atexit.register(self._ignore)

    def _wait(self, reader: int) -> None:
        """The thread: what is written is the number of a signal, and 0 when all is over."""
        while number := os.read(reader, 1)[0]:
            if number in self._signals:
                os.write(2, f"{self._line}\n".encode())
                os._exit(self._code)
        os.close(reader)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        """Nothing: the thread is awake already."""

    def close(self) -> None:
        """A signal that came before this call still ends the process."""
        self._closed = True
        self._restore()
        signal.set_wakeup_fd(-1)
        os.write(self._writer, b"\0")
        self._thread.join()
        os.close(self._writer)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._heard:
                signal.signal(number, handler)

    def _leave_to_parent(self) -> None:
        """A forked child has the handlers and the pipe, but not the thread."""
        if not self._closed:
            signal.set_wakeup_fd(-1)
            self._restore()

    def _ignore(self) -> None:
        for number in self._signals:
            signal.signal(number, signal.SIG_IGN)


_watch: _Watch | None = None
