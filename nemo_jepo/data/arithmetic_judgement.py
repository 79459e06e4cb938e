"""Judgements of answers to generated problems (data.arithmetic.answers=judgement): is an answer correct? In pairs.

    prompt              PROMPT with the reference answer of a problem, and an answer of the same or another value
    chain of thought    6-4=2      both values, and by how much they differ (mod 10).
                                   corrupted: the answer's value is misread, which turns the verdict round
    answer              correct or wrong

The two prompts of a pair, one with a correct answer and one with a wrong one, share the reference answer.
Answers are written as with answers=mixed: a problem in words has a phrase, and a correct one seldom has the reference's
words.
"""

import random
from collections.abc import Iterator, Sequence

from nemo_jepo.config.schema import ArithmeticConfig
from nemo_jepo.data import arithmetic_text
from nemo_jepo.data.arithmetic_text import NUMBERS, Expression
from nemo_jepo.data.files import Row

PROMPT = "Reference: {reference_answer}\nAnswer: {answer}\nCorrect?"
"""Short: a model that learns from scratch needs many examples to see when two values are one (docs/log.md)."""


def judgement_rows(
    config: ArithmeticConfig,
    problems: Sequence[tuple[Expression, int, bool]],
    kinds: Sequence[str],
    rng: random.Random,
    style: random.Random,
) -> Iterator[Row]:
    """Two rows a problem.

    Args:
        problems: [P], each with its value and whether it is in words, as its answers then are.
        kinds: [2 * P], of the chains of thought: right, corrupted or absent.
        rng, style: draw wrong values, and phrases.
    """
    for place, (expression, value, in_words) in enumerate(problems):
        reference = arithmetic_text.answer(expression, [value], "mixed", in_words, style)
        for line, own in enumerate((value, _other(value, rng)), start=2 * place + 1):
            answer = arithmetic_text.answer(expression, [own], "mixed", in_words, style)
            kind, read = kinds[line - 1], own
            if kind == "corrupted":
                read = value if own != value else _other(value, rng)
            led_to = read if config.corrupted_answer == "follows" else own
            yield Row(
                "arithmetic",
                line,
                PROMPT.format(reference_answer=reference, answer=answer),
                "correct" if led_to == value else "wrong",
                None if kind == "absent" else f"{value}-{read}={(value - read) % len(NUMBERS)}",
                group=f"pair/{place}",
            )


def _other(value: int, rng: random.Random) -> int:
    """One of the nine other values."""
    return (value + rng.randrange(1, len(NUMBERS))) % len(NUMBERS)
