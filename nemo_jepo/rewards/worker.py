"""The verifier's worker process: one JSON line in, one JSON line out. Started by `nemo_jepo.rewards.verify` alone.

    in   {"own": str, "reference": str, "timeout_s": float}
    out  true | false | null (the library failed)

The kernel keeps the time: SIGALRM at its default action ends the process, even inside a big-integer power that never
lets another Python thread run. So a hanging answer costs its time limit, and a worker never outlives a dead parent.
It imports nothing of the project and no torch: 80 MB.
"""

import json
import logging
import os
import re
import resource
import signal
import sys

from math_verify import parse, verify

MEMORY_LIMIT_BYTES = 4 * 2**30
PROSE = re.compile(r"(?<![\\A-Za-z0-9])[A-Za-z]{3,}")
"""A word, as in "7 apples"; not a LaTeX command and not a product of variables such as 2xyz."""
DELIMITED = re.compile(r"\$|\\\(|\\\[|\\boxed")


def as_mathematics(answer: str) -> str:
    """The answer with LaTeX delimiters, unless it has its own or is prose.

    The library looks for mathematics inside text; of a bare "2x" it would find the 2 alone.
    """
    return answer if DELIMITED.search(answer) or PROSE.search(answer) else f"${answer}$"


def is_same(own: str, reference: str) -> bool:
    """Whether math-verify finds both answers equal. Its own timeouts are off: they need the signal that we need."""
    gold, target = (
        parse(as_mathematics(answer), parsing_timeout=None, raise_on_error=True) for answer in (reference, own)
    )
    return verify(gold, target, timeout_seconds=None, raise_on_error=True)


def main() -> None:
    """Answers until standard input ends."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # meant for the trainer, which closes our input
        signal.signal(ignored, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    sys.set_int_max_str_digits(0)  # a loop of digits is a wrong answer, not a fault
    logging.disable()
    verdicts, sys.stdout = sys.stdout, open(os.devnull, "w")  # some parsers print
    print(json.dumps("ready"), file=verdicts, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, request["timeout_s"])
        try:
            verdict = bool(is_same(request["own"], request["reference"]))
        except Exception:  # whatever a parser raises on hostile text, out of memory included, is a fault
            verdict = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), file=verdicts, flush=True)


if __name__ == "__main__":
    main()
