"""A worker that asks math-verify about two whole answers, as a verifier without rules of its own would."""

import logging
import re
import sys

from math_verify import parse, verify

from nemo_jepo.rewards.process import serve

PROSE = re.compile(r"(?<![\\A-Za-z0-9])[A-Za-z]{3,}")
DELIMITED = re.compile(r"\$|\\\(|\\\[|\\boxed")


def as_mathematics(answer: str) -> str:
    """The answer with LaTeX delimiters, unless it has its own or is prose; of a bare "2x" the library reads the 2."""
    return answer if DELIMITED.search(answer) or PROSE.search(answer) else f"${answer}$"


def is_same(pair: tuple[str, str]) -> bool:
    """Whether math-verify finds both equal; equal text is equal without it."""
    own, reference = (" ".join(answer.split()).casefold() for answer in pair)
    if own == reference:
        return True
    gold, target = (parse(as_mathematics(answer), parsing_timeout=None) for answer in (pair[1], pair[0]))
    return bool(verify(gold, target, timeout_seconds=None))


if __name__ == "__main__":
    sys.set_int_max_str_digits(0)
    logging.disable()
    serve(is_same)
