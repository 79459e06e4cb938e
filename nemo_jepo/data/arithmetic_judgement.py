"""Judgements of answers to generated problems (data.arithmetic.answers=judgement): is an answer correct? In pairs.

    prompt              GRADE_PROMPT with a problem, its reference answer, and an answer of the same or another value
    chain of thought    reference 6, answer 4      corrupted: the answer's value misread, which turns the verdict round
    answer              correct or wrong

The two prompts of a pair, one with a correct answer and one with a wrong one, share problem and reference answer.
Answers are written as with answers=mixed: a problem in words has a phrase, and a correct one seldom has the reference's
words.
"""

import random
from collections.abc import Iterator, Sequence

from nemo_jepo.config.judge import GRADE_PROMPT
from nemo_jepo.config.schema import ArithmeticConfig
from nemo_jepo.data import arithmetic_text
from nemo_jepo.data.arithmetic_text import Expression
from nemo_jepo.data.files import Row

NUM_VALUES = 10


def judgement_rows(
    config: ArithmeticConfig,
    problems: Sequence[tuple[Expression, int, bool]],
    kinds: Sequence[str],
    rng: random.Random,
    style: random.Random,
) -> Iterator[Row]:
    """Two rows a problem.

    Args:
        problems: [P], each with its value and whether it is in words.
        kinds: [2 * P], of the chains of thought: right, corrupted or absent.
        rng, style: draw wrong values, and phrases.
    """
    for place, (expression, value, in_words) in enumerate(problems):
        question = arithmetic_text.question(expression, in_words)
        reference = arithmetic_text.answer(expression, [value], "mixed", in_words, style)
        for line, own in enumerate((value, _other(value, rng)), start=2 * place + 1):
            answer = arithmetic_text.answer(expression, [own], "mixed", in_words, style)
            kind, read = kinds[line - 1], own
            if kind == "corrupted":
                read = value if own != value else _other(value, rng)
            led_to = read if config.corrupted_answer == "follows" else own
            texts = {"{question}": question, "{reference_answer}": reference, "{answer}": answer}
            yield Row(
                "arithmetic",
                line,
                _filled(texts),
                "correct" if led_to == value else "wrong",
                None if kind == "absent" else f"reference {value}, answer {read}",
                group=f"pair/{place}",
            )


def _filled(texts: dict[str, str]) -> str:
    prompt = GRADE_PROMPT
    for name, text in texts.items():  # generated, so that no text holds another's name
        prompt = prompt.replace(name, text)
    return prompt


def _other(value: int, rng: random.Random) -> int:
    """One of the nine other values."""
    return (value + rng.randrange(1, NUM_VALUES)) % NUM_VALUES
