"""0/1 correctness of an own answer by the scorer of the task that it answers (data=reasoning_gym).

    true    score_answer(answer, item) >= 1

The package also gives parts of a point: for a right format (0.01 or 0.05), for the share of right cells or words, for
an answer inside a longer text. None of them is a true answer, so all of them are false here. But an answer that makes
one claim is asked about as that claim (`nemo_jepo.rewards.claims`): `**9**`, and 9 before a sentence that repeats it.

Some scorers parse or evaluate what a model wrote, so they run in a process with a limit of CPU time and memory.
"""

from collections.abc import Mapping
from typing import Any

from nemo_jepo.rewards.claims import as_claim
from nemo_jepo.rewards.process import WorkerFault, WorkerProcess
from nemo_jepo.types import Prompt

WORKER = "nemo_jepo.rewards.task_worker"


def _one_value(own: str) -> str | None:
    """The one value that the answer claims, where it claims one without a unit."""
    claim = as_claim(own)
    values = () if claim is None else claim.values
    return values[0].latex if len(values) == 1 and not values[0].unit else None


class TaskScorer(WorkerProcess):
    """Asks the scorer of one task, by its worker.

    Args:
        task, arguments: of the package, as the prompts were made with.
        cpu_limit_s: seconds of CPU time that one answer may take.
    """

    def __init__(self, task: str, arguments: Mapping[str, Any], cpu_limit_s: float) -> None:
        super().__init__(WORKER, cpu_limit_s)
        self._task, self._arguments = task, dict(arguments)

    def is_right(self, own: str, prompt: Prompt) -> bool | None:
        """Whether the own answer is true, or would be without a full stop, or its one claim is; None after a fault.

        Raises:
            RuntimeError: the worker cannot start.
        """
        request = {"task": self._task, "arguments": self._arguments, "entry": prompt.task_entry}
        try:
            wordings = dict.fromkeys((own, own.removesuffix("."), _one_value(own) or own))
            return any(self.ask(request | {"answer": wording}) >= 1 for wording in wordings)
        except WorkerFault:
            return None
