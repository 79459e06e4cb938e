"""Near duplicates within one list of questions, found exactly: nothing is estimated and no pair is missed."""

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import chain
from math import ceil

from tqdm import tqdm

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.tools.prepare.records import Splits
from nemo_jepo.tools.prepare.steps import Account, Step, dropped, exact_number
from nemo_jepo.tools.prepare.text import ngrams

SHINGLE_WORDS = 5


def near_duplicates(questions: Sequence[str], threshold: Fraction) -> list[int | None]:
    """For each question the first earlier one that stays and that it resembles; None where it stays itself.

        J(a, b) = |a & b| / |a | b| >= threshold     of the sets of word shingles (5-grams, `text.ngrams`)

    Where J >= threshold, |a & b| >= threshold * |a|: more than |a| - ceil(threshold * |a|) shingles of a cannot be
    missing in b. So with all shingles in one order, both sets have a common one among their first
    |a| - ceil(threshold * |a|) + 1. Only these are indexed, the rarest shingles first, and every candidate is compared
    in full. A question without words resembles none.

    Args:
        threshold: above 0, at most 1. 1 asks for equal sets.
    Source: prefix filter of Bayardo, Ma and Srikant, "Scaling up all pairs similarity search" (WWW 2007); shingles of
        5 words are those of Lee et al., arXiv 2107.06499.
    """
    numbers: dict[str, int] = {}
    shingles = [
        {numbers.setdefault(shingle, len(numbers)) for shingle in sorted(ngrams(question, SHINGLE_WORDS))}
        for question in tqdm(questions, desc="shingles", unit="row", mininterval=1, dynamic_ncols=True)
    ]
    frequency = Counter(chain.from_iterable(shingles))
    index: dict[int, list[int]] = {}
    found: list[int | None] = []
    for row, own in enumerate(tqdm(shingles, desc="near duplicates", unit="row", mininterval=1, dynamic_ncols=True)):
        rarest = sorted(own, key=lambda shingle: (frequency[shingle], shingle))
        prefix = rarest[: len(own) - ceil(threshold * len(own)) + 1]
        candidates = sorted({earlier for shingle in prefix for earlier in index.get(shingle, ())})
        twin = next((earlier for earlier in candidates if resemble(own, shingles[earlier], threshold)), None)
        found.append(twin)
        if twin is None:
            for shingle in prefix:
                index.setdefault(shingle, []).append(row)
    return found


def resemble(a: set[int], b: set[int], threshold: Fraction) -> bool:
    """J(a, b) >= threshold, in whole numbers."""
    common = len(a & b)
    return common * threshold.denominator >= threshold.numerator * (len(a) + len(b) - common)


def near_duplicates_step(value: str) -> Step:
    """--near-duplicates THRESHOLD: of training rows that resemble each other the first stays, also of a later held-out
    split.

    Raises:
        ConfigError: no number above 0 and up to 1.
    """
    option, rule, example = "--near-duplicates", "must be a decimal number above 0 and at most 1", "0.8"
    threshold = exact_number(option, value, rule, example)
    if threshold == 0:
        raise ConfigError(option, value, rule, f"Give for example {example}")

    def apply(splits: Splits) -> tuple[Splits, Account]:
        found = near_duplicates([example.question for _, example in splits["train"]], threshold)
        account = {"threshold": float(threshold), "shingle_words": SHINGLE_WORDS}
        return dropped(splits, [twin is None for twin in found], account)

    return Step("near_duplicates", apply, drops=True, before_hold_out=True)
