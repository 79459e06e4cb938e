r"""Which reference answers the verifier can grade: the `verifiable` flag of prepared data.

An answer is verifiable if it is a choice or mathematics (`nemo_jepo.rewards.claims`), and the verifier, as a reward
would use it,

    accepts the answer in another writing, \boxed{answer}, and
    rejects another answer, the same text with its first digit changed (without a digit: with + 1 behind it).

Words are text, which equals the same text alone; so is a statement of which the library would read a part, such as the
paper's example "\forall x \in \mathbb{R}, x^2 + (a-1)x + 1 \geq 0". A fault of the verifier (its CPU limit passed)
is no verdict: the flag is None.
"""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from queue import SimpleQueue

from tqdm import tqdm

from nemo_jepo.rewards.claims import as_reference
from nemo_jepo.rewards.verify import Verifier

ANSWERS_PER_TASK = 32


def verifiable_answers(answers: Sequence[str], num_workers: int, cpu_limit_s: float = 5.0) -> list[bool | None]:
    """Whether the verifier can grade each answer; equal answers are tried once.

    Every worker is a process of its own, which an endless answer cannot hold for more CPU time than cpu_limit_s.
    Progress goes to stderr.

    Args:
        num_workers: verifiers at work at the same time.
        cpu_limit_s: seconds of CPU time that one comparison may take.
    """
    distinct = list(dict.fromkeys(answers))
    tasks = [distinct[first : first + ANSWERS_PER_TASK] for first in range(0, len(distinct), ANSWERS_PER_TASK)]
    idle: SimpleQueue[Verifier] = SimpleQueue()
    verdicts: dict[str, bool | None] = {}
    with ExitStack() as stack:
        for _ in range(num_workers):
            idle.put(stack.enter_context(Verifier(cpu_limit_s)))
        pool = ThreadPoolExecutor(num_workers)
        stack.callback(pool.shutdown, cancel_futures=True)
        with tqdm(total=len(distinct), desc="verifier", unit="answer", mininterval=1, dynamic_ncols=True) as bar:
            for done in as_completed([pool.submit(_judge, idle, task) for task in tasks]):
                verdicts.update(done.result())
                bar.update(len(done.result()))
    return [verdicts[answer] for answer in answers]


def _judge(idle: "SimpleQueue[Verifier]", answers: Sequence[str]) -> dict[str, bool | None]:
    """The verdicts on some answers, by a verifier that nobody else is using."""
    verifier = idle.get()
    try:
        return {answer: is_verifiable(verifier, answer) for answer in answers}
    finally:
        idle.put(verifier)


def is_verifiable(verifier: Verifier, answer: str) -> bool | None:
    """The tests at the head of this file; None after a fault."""
    if as_reference(answer).kind == "text":
        return False
    (accepted,) = verifier.verify([(in_another_writing(answer), answer)])
    if not accepted:
        return accepted
    (confused,) = verifier.verify([(another_answer(answer), answer)])
    return None if confused is None else not confused


def in_another_writing(answer: str) -> str:
    r"""\boxed{answer}, without the dollars that may stand around it."""
    return rf"\boxed{{{undelimited(answer)}}}"


def another_answer(answer: str) -> str:
    """A text that differs in its mathematics: 12 -> 22, 9 -> 8, x -> x+1."""
    text = undelimited(answer)
    changed = re.sub(r"\d", lambda digit: str(int(digit[0]) + 1 if int(digit[0]) < 9 else 8), text, count=1)
    return rf"\boxed{{{changed if changed != text else f'{text}+1'}}}"


def undelimited(answer: str) -> str:
    """The inside of $...$, where all of the answer is one formula."""
    text = answer.strip()
    whole = len(text) > 2 and text[0] == text[-1] == "$" and text.count("$") == 2
    return text[1:-1].strip() if whole else text
