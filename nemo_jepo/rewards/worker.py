"""The verifier's worker process, started by `nemo_jepo.rewards.verify` alone.

    request   [own answer, reference answer]
    answer    true | false; a fault where the library failed

Text is text, numbers are compared as they stand, and math-verify is asked about the rest, one value at a time: of a
whole answer it would read the part that it finds first. No torch is imported: 80 MB.
"""

import logging
import re
import sys
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify
from math_verify.parser import NormalizationConfig

from nemo_jepo.rewards.claims import Claim, Value, as_claim, as_reference
from nemo_jepo.rewards.process import serve

NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)")
DECIMAL = re.compile(r"(\d*)\.(\d+)")
NORMALIZATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none", equations=False
)
"""math-verify rewrites no more than LaTeX: as units it would drop the letters of 18th."""
SET = re.compile(r"\s*[(\[]|\s*\\\{|.*\\cup|.*\\infty", re.DOTALL)


def is_right(pair: tuple[str, str]) -> bool:
    """Whether the own answer makes one claim, and the reference answer makes the same."""
    own, reference = as_claim(pair[0]), as_reference(pair[1])
    return own is not None and is_same_claim(own, reference)


def is_same_claim(own: Claim, reference: Claim) -> bool:
    """Equal text, or equal values in any order."""
    if own.text == reference.text:
        return True
    if not own.values or len(own.values) != len(reference.values):
        return False
    left = list(own.values)
    for expected in reference.values:
        found = next((value for value in left if is_same_value(value, expected)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def is_same_value(own: Value, reference: Value) -> bool:
    """Equal in name and unit, where both have one, and in all that the own answer says the value is."""
    if own.name and reference.name and own.name != reference.name:
        return False
    if own.unit != reference.unit and "percent" in (own.unit, reference.unit):
        return _is_same_percentage(own, reference)
    if own.unit and reference.unit and own.unit != reference.unit:
        return False
    if len(reference.sides) > 1:  # an equation
        return len(own.sides) > 1 and is_same_mathematics(own.latex, reference.latex)
    (expected,) = reference.sides
    if own.is_relation and not (reference.is_relation or SET.match(expected)):
        return False
    if len(own.sides) == 1 and (own.is_relation or reference.is_relation):
        return is_same_mathematics(own.sides[0], expected)
    return all(is_same_mathematics(side, expected) for side in own.sides)


def _is_same_percentage(own: Value, reference: Value) -> bool:
    """42% is 42 to whoever asked for a percentage, and 0.42 to everybody else."""
    if len(own.sides) != 1 or len(reference.sides) != 1:
        return False
    of_own, of_reference = own.sides[0], reference.sides[0]
    percentage, other = (of_own, of_reference) if own.unit == "percent" else (of_reference, of_own)
    return is_same_mathematics(of_own, of_reference) or is_same_mathematics(rf"\frac{{{percentage}}}{{100}}", other)


def is_same_mathematics(own: str, reference: str) -> bool:
    """Equal numbers as they stand; anything else by math-verify, whose own timeouts, of wall time, are off."""
    if NUMBER.fullmatch(own) and NUMBER.fullmatch(reference):
        return Fraction(own) == Fraction(reference)
    gold, target = _parsed(reference), _parsed(own)
    same = verify(gold, target, timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=True)
    return bool(same) and not _differ_relatively(target[0], gold[0])


def _differ_relatively(one: Any, other: Any) -> bool:
    """Whether two numbers differ by more than rounding; to math-verify 10^{-20} and 10^{-21} are both 0."""
    if not (getattr(one, "is_number", False) and getattr(other, "is_number", False)):
        return False
    ratio = (one / other).evalf(15)
    return bool(ratio.is_finite and abs(ratio - 1) > 1e-9)


def _parsed(latex: str) -> Sequence[Any]:
    """What math-verify reads of all of it, nothing where it cannot: then it would be content with a part.

    Decimals are fractions to it, which are exact; it would round them to six places, and 10^{-7} to 0.
    """
    exact = DECIMAL.sub(lambda number: rf"\frac{{{number[1]}{number[2]}}}{{1{'0' * len(number[2])}}}", latex)
    return parse(
        f"${exact}$",
        extraction_config=[LatexExtractionConfig(normalization_config=NORMALIZATION)],
        fallback_mode="no_fallback",
        parsing_timeout=None,
        raise_on_error=True,
    )


def main() -> None:
    """Answers until standard input ends."""
    sys.set_int_max_str_digits(0)  # a loop of digits is a wrong answer, not a fault
    logging.disable()
    serve(is_right)


if __name__ == "__main__":
    main()
