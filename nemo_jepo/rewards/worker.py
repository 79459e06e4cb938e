"""The verifier's worker process, started by `nemo_jepo.rewards.verify` alone.

    request   [own answer, reference answer]
    answer    true | false; a fault where the library failed

It imports no torch: 80 MB.
"""

import logging
import re
import sys

from math_verify import parse, verify

from nemo_jepo.rewards.process import serve

PROSE = re.compile(r"(?<![\\A-Za-z0-9])[A-Za-z]{3,}")
"""A word, as in "7 apples"; not a LaTeX command and not a product of variables such as 2xyz."""
DELIMITED = re.compile(r"\$|\\\(|\\\[|\\boxed")


def as_mathematics(answer: str) -> str:
    """The answer with LaTeX delimiters, unless it has its own or is prose.

    The library looks for mathematics inside text; of a bare "2x" it would find the 2 alone.
    """
    return answer if DELIMITED.search(answer) or PROSE.search(answer) else f"${answer}$"


def is_same(pair: tuple[str, str]) -> bool:
    """Whether math-verify finds both answers equal. Its own timeouts are off: they count wall time."""
    own, reference = pair
    gold, target = (
        parse(as_mathematics(answer), parsing_timeout=None, raise_on_error=True) for answer in (reference, own)
    )
    return bool(verify(gold, target, timeout_seconds=None, raise_on_error=True))


def main() -> None:
    """Answers until standard input ends."""
    sys.set_int_max_str_digits(0)  # a loop of digits is a wrong answer, not a fault
    logging.disable()
    serve(is_same)


if __name__ == "__main__":
    main()
