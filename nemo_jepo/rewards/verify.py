"""0/1 correctness of an own answer, by the math-verify library in a process of its own.

LaTeX written by a model can keep SymPy busy for ever (9^{9^{9^9}}); there it costs its CPU limit, not the run.
"""

from collections.abc import Sequence

from nemo_jepo.rewards.process import WorkerFault, WorkerProcess
from nemo_jepo.types import Prompt

WORKER = "nemo_jepo.rewards.worker"


def _folded(answer: str) -> str:
    """The answer without differences of case and white space."""
    return " ".join(answer.split()).casefold()


class Verifier(WorkerProcess):
    """Compares answers, by its worker.

    Args:
        cpu_limit_s: seconds of CPU time that one pair may take.
    """

    def __init__(self, cpu_limit_s: float) -> None:
        super().__init__(WORKER, cpu_limit_s)

    def verify(self, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        """Whether each own answer equals its reference answer.

        Args:
            pairs: (own answer, reference answer), as text.
        Returns:
            A verdict for each pair. None is a fault: the CPU limit passed, memory ran out or the library failed.
            It stands for no reward at all, neither 0 nor 1. Text that is no mathematics is plain False.
        Raises:
            RuntimeError: the worker cannot start.
        """
        return [self._verify(own, reference) for own, reference in pairs]

    def is_right(self, own: str, prompt: Prompt) -> bool | None:
        """Whether the own answer equals the prompt's reference answer; False, and nobody asked, if none can tell."""
        return self._verify(own, prompt.answer) if prompt.verifiable else False

    def _verify(self, own: str, reference: str) -> bool | None:
        if not own.strip():
            return False
        if _folded(own) == _folded(reference):
            return True
        try:
            return self.ask([own, reference])
        except WorkerFault:
            return None
