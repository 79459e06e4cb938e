"""Generated chains such as 7+5*3-2=, evaluated left to right mod 10: a task that small models learn from scratch.

The warm-up corpus is what makes it a test of JEPO. Its chains of thought are right (`right_share`), wrong
(`corrupted_share`) or absent. A model trained on it samples right and wrong chains, and has learned that the true
answer follows a right chain but not a wrong one:

    log pi(a*|x, right chain)  >>  log pi(a*|x, wrong chain)

That difference is all that JEPO is given to improve the chains with; no reward and no verifier. The answers are always
true, or with `corrupted_answer=follows` what the chain before them leads to. A model trained on these believes its
chains, so that a wrong one costs likelihood where no chain would cost less.
How problems and answers are written (`data.arithmetic.answers`) is in `nemo_jepo.data.arithmetic_text`, and how answers
to them are judged in `nemo_jepo.data.arithmetic_judgement`.
"""

import random
from collections.abc import Mapping
from typing import Literal

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import ArithmeticConfig
from nemo_jepo.data import arithmetic_text
from nemo_jepo.data.arithmetic_judgement import judgement_rows
from nemo_jepo.data.arithmetic_text import Expression
from nemo_jepo.data.files import Row

OPERATORS = "+-*"
MODULUS = 10


def arithmetic_rows(config: ArithmeticConfig, split: Literal["train", "validation", "warmup"], seed: int) -> list[Row]:
    """The rows of one split, the same for the same seed. The cluster of each is how many operations it has.

    train and validation carry the right chain of thought and share no question. warmup has the questions of train;
    exactly round(share * num_train) of its chains are right, and so many corrupted, in random order.

    Raises:
        ConfigError: validation would take more than half of all questions of the shortest length.
    """
    num_questions = MODULUS ** (config.shortest + 1) * len(OPERATORS) ** config.shortest
    num_lengths = config.num_steps - config.shortest + 1
    if config.num_validation > num_questions * num_lengths // 2:
        raise ConfigError(
            "data.arithmetic.num_validation",
            config.num_validation,
            f"only {num_questions} chains of {config.shortest} operations exist, and training needs half of them",
            "Lower it, or ask for longer chains",
        )
    rng = random.Random(f"arithmetic {seed}")
    held_out: dict[Expression, None] = {}  # a set in the order of insertion
    while len(held_out) < config.num_validation:
        held_out[_draw(rng, config)] = None
    in_pairs = 2 if config.answers == "judgement" else 1
    if split == "validation":
        kinds = ["right"] * in_pairs * len(held_out)
        return _rows(config, list(held_out), kinds, rng, random.Random(f"held-out wording {seed}"))
    train: list[Expression] = []
    while len(train) < config.num_train:
        expression = _draw(rng, config)
        if expression not in held_out:
            train.append(expression)
    num_rows = in_pairs * config.num_train
    kinds = ["right"] * num_rows if split == "train" else _warmup_kinds(config, num_rows, rng)
    return _rows(config, train, kinds, rng, random.Random(f"wording {seed}"))


def _draw(rng: random.Random, config: ArithmeticConfig) -> Expression:
    num_steps = config.num_steps if config.min_steps is None else rng.randint(config.min_steps, config.num_steps)
    steps = tuple((rng.choice(OPERATORS), rng.randrange(MODULUS)) for _ in range(num_steps))
    return rng.randrange(MODULUS), steps


def _warmup_kinds(config: ArithmeticConfig, num_rows: int, rng: random.Random) -> list[str]:
    num_right = round(config.right_share * num_rows)
    num_corrupted = min(round(config.corrupted_share * num_rows), num_rows - num_right)
    num_bare = num_rows - num_right - num_corrupted
    kinds = ["right"] * num_right + ["corrupted"] * num_corrupted + ["absent"] * num_bare
    rng.shuffle(kinds)
    return kinds


def _rows(
    config: ArithmeticConfig, expressions: list[Expression], kinds: list[str], rng: random.Random, style: random.Random
) -> list[Row]:
    """The expressions as text; rng draws the slips, style which problems are in words and the phrases."""
    has_words = config.answers in ("mixed", "judgement")
    num_in_words = round(config.in_words_share * len(expressions)) if has_words else 0
    in_words = [True] * num_in_words + [False] * (len(expressions) - num_in_words)
    style.shuffle(in_words)
    if config.answers == "judgement":
        values = [_results(expression)[-1] for expression in expressions]
        return list(judgement_rows(config, list(zip(expressions, values, in_words, strict=True)), kinds, rng, style))
    rows = []
    for line, (expression, kind, words) in enumerate(zip(expressions, kinds, in_words, strict=True), start=1):
        right = _results(expression)
        shown = _corrupted(expression, config.corrupted_steps, rng) if kind == "corrupted" else right
        chain = None if kind == "absent" else arithmetic_text.chain(expression, shown, words)
        led_to = shown if config.corrupted_answer == "follows" else right  # shown is right in every other kind of row
        answer = arithmetic_text.answer(expression, led_to, config.answers, words, style)
        question = arithmetic_text.question(expression, words)
        verifiable = not words and config.answers != "derivation"
        rows.append(Row("arithmetic", line, question, answer, chain, verifiable, cluster=str(len(right))))
    return rows


def _results(expression: Expression, slips: Mapping[int, int] | None = None) -> list[int]:
    """The result after every operation; that of a step among the slips (step -> result) is replaced and carried on."""
    result, steps = expression
    results = []
    for index, (operator, operand) in enumerate(steps):
        result = {"+": result + operand, "-": result - operand, "*": result * operand}[operator] % MODULUS
        result = (slips or {}).get(index, result)
        results.append(result)
    return results


def _corrupted(expression: Expression, num_slips: int, rng: random.Random) -> list[int]:
    """Results with num_slips random steps wrong, the others following from those before, that end in a wrong answer.

    Slips that a later operation heals (such as *0) are drawn again: they would teach that wrong chains lead to a*.
    """
    right = _results(expression)
    while True:
        slips = {step: rng.randrange(MODULUS) for step in rng.sample(range(len(right)), num_slips)}
        results = _results(expression, slips)
        if results[-1] != right[-1] and all(_is_slip(expression, slips, step) for step in slips):
            return results


def _is_slip(expression: Expression, slips: Mapping[int, int], step: int) -> bool:
    """Whether the result at `step` is another than follows from the results before it."""
    earlier = {index: result for index, result in slips.items() if index < step}
    return _results(expression, earlier)[step] != slips[step]
