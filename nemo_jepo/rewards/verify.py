"""0/1 correctness of an own answer, by the math-verify library in a process of its own.

LaTeX written by a model can keep SymPy busy for ever (9^{9^{9^9}}); there it costs its time limit, not the run.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

WORKER = Path(__file__).with_name("worker.py")


def _folded(answer: str) -> str:
    """The answer without differences of case and white space."""
    return " ".join(answer.split()).casefold()


class Verifier:
    """Compares answers; the worker starts when first needed and again after it had to be ended.

    Args:
        timeout_s: seconds that one pair may take.
    """

    def __init__(self, timeout_s: float) -> None:
        if timeout_s <= 0:
            raise ValueError(f"timeout_s={timeout_s} must be positive")
        self._timeout_s = timeout_s
        self._worker: subprocess.Popen[str] | None = None

    def verify(self, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        """Whether each own answer equals its reference answer.

        Args:
            pairs: (own answer, reference answer), as text.
        Returns:
            A verdict for each pair. None is a fault: the time limit passed, memory ran out or the library failed.
            It stands for no reward at all, neither 0 nor 1. Text that is no mathematics is plain False.
        Raises:
            RuntimeError: the worker cannot start.
        """
        return [self._verify(own, reference) for own, reference in pairs]

    def close(self) -> None:
        """Ends the worker. A later `verify` starts another."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _verify(self, own: str, reference: str) -> bool | None:
        if not own.strip():
            return False
        if _folded(own) == _folded(reference):
            return True
        verdict = self._ask({"own": own, "reference": reference, "timeout_s": self._timeout_s})
        if verdict == "":  # the worker is dead, by its alarm or otherwise
            self.close()
            return None
        return json.loads(verdict)

    def _ask(self, request: dict[str, object]) -> str:
        """The worker's answer line; empty if it died over the request."""
        if self._worker is None:
            self._worker = _started_worker()
        assert self._worker.stdin is not None and self._worker.stdout is not None
        try:
            self._worker.stdin.write(json.dumps(request) + "\n")
            self._worker.stdin.flush()
        except BrokenPipeError:  # killed from outside between two pairs
            return ""
        return self._worker.stdout.readline()


def _started_worker() -> "subprocess.Popen[str]":
    """A worker that has imported its libraries, so that no pair's time limit pays for that."""
    worker = subprocess.Popen(
        [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="ascii"
    )
    assert worker.stdout is not None
    if worker.stdout.readline() == "":
        raise RuntimeError(f"the verifier's worker ended with code {worker.wait()} before it was ready; see above")
    return worker
