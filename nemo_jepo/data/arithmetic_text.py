"""How a generated problem is written: its question, its chain of thought and its reference answer.

    short         7+5*3=                        7+5=2 2*3=6                   6
    in words      seven plus five times three   seven plus five is two, ...   it comes to six
    derivation    7+5*3=                        7+5=2 2*3=6                   The value is 6. First, 7+5=2. Then, 2*3=6.

answers=short writes the first, answers=mixed the first two, answers=derivation the third. No verifier reads a phrase or
a derivation: there are several of each, drawn by chance, and they hold words. A derivation begins with its result, as
solutions in textbooks do, so that whoever writes it must have done the sum before.
"""

import random

Expression = tuple[int, tuple[tuple[str, int], ...]]
"""First operand and the (operator, operand) pairs after it."""

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OPERATORS = {"+": "plus", "-": "minus", "*": "times"}
PHRASES = ("it comes to {}", "it ends up at {}", "you get {}", "{}, all in all", "what remains is {}", "that makes {}")
RESULTS = ("The value is {}.", "We obtain {}.", "It equals {}.")
FIRST, THEN = ("First, {}.", "To begin with, {}."), ("Then, {}.", "Next, {}.", "From this, {}.")


def question(expression: Expression, in_words: bool) -> str:
    """7+5*3= or "seven plus five times three"."""
    first, steps = expression
    if in_words:
        return NUMBERS[first] + "".join(f" {OPERATORS[operator]} {NUMBERS[operand]}" for operator, operand in steps)
    return str(first) + "".join(f"{operator}{operand}" for operator, operand in steps) + "="


def chain(expression: Expression, results: list[int], in_words: bool) -> str:
    """7+5*3 -> "7+5=2 2*3=6", or the same in words; results are those shown after every operation."""
    equations = _equations(expression, results)
    if not in_words:
        return " ".join(equations)
    return ", ".join(" ".join(_spelled(sign) for sign in equation) for equation in equations)


def answer(expression: Expression, results: list[int], answers: str, in_words: bool, rng: random.Random) -> str:
    """The reference answer; rng draws among phrases."""
    if answers == "derivation":
        openings = [rng.choice(RESULTS).format(results[-1])]
        for place, equation in enumerate(_equations(expression, results)):
            openings.append(rng.choice(THEN if place else FIRST).format(equation))
        return " ".join(openings)
    return rng.choice(PHRASES).format(NUMBERS[results[-1]]) if in_words else str(results[-1])


def _equations(expression: Expression, results: list[int]) -> list[str]:
    first, steps = expression
    before = [first, *results[:-1]]
    return [
        f"{left}{operator}{operand}={result}"
        for left, (operator, operand), result in zip(before, steps, results, strict=True)
    ]


def _spelled(sign: str) -> str:
    return NUMBERS[int(sign)] if sign.isdecimal() else OPERATORS.get(sign, "is")
