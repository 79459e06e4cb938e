"""Whether an own answer to a generated problem is true, however it is written.

For evaluation alone: no reward may read it (a contract of import-linter holds that), because real unverifiable data has
no oracle. It reads the question's text and shares nothing with the generator but the words for numbers.
"""

import re

from nemo_jepo.data.arithmetic_text import NUMBERS, OPERATORS
from nemo_jepo.types import Prompt

_SIGNS = {name: str(number) for number, name in enumerate(NUMBERS)} | {name: sign for sign, name in OPERATORS.items()}
_WORD = re.compile(rf"\b({'|'.join(_SIGNS)})\b", re.IGNORECASE)


class ArithmeticOracle:
    """The oracle in the form in which `nemo_jepo.grading.grade` asks: like a verifier, which it is not.

    Args:
        derivation: reference answers are derivations (data.arithmetic.answers).
    """

    def __init__(self, derivation: bool) -> None:
        self._derivation = derivation

    def is_right(self, own: str, prompt: Prompt) -> bool:
        """Whether the own answer is true of the prompt's question."""
        return is_true(prompt.question, own, self._derivation)

    def close(self) -> None:
        """Nothing runs beside it."""


def is_true(question: str, own: str, derivation: bool) -> bool:
    """Whether the own answer names the question's value, and no other.

    A derivation must name it in its first sentence, and then make every step of the question, in order, and no other.
    """
    steps = _steps(question)
    if not derivation:
        return _values(own) == [steps[-1][-1]]
    result, _, rest = own.partition(".")
    equations = re.findall(r"(\d+)([-+*])(\d+)=(\d+)", rest)
    return _values(result) == [steps[-1][-1]] and equations == steps


def _steps(question: str) -> list[tuple[str, ...]]:
    """7+5*3= -> [("7", "+", "5", "2"), ("2", "*", "3", "6")], mod 10."""
    left, *rest = re.findall(r"[-+*]|\d", _WORD.sub(lambda word: _SIGNS[word[0].lower()], question))
    steps: list[tuple[str, ...]] = []
    for operator, right in zip(rest[::2], rest[1::2], strict=True):
        a, b = int(left), int(right)
        result = str({"+": a + b, "-": a - b, "*": a * b}[operator] % 10)
        steps.append((left, operator, right, result))
        left = result
    return steps


def _values(text: str) -> list[str]:
    """Every number that a text names, in digits or words."""
    return re.findall(r"\d+", _WORD.sub(lambda word: f" {_SIGNS[word[0].lower()]} ", text))
