"""Worked chains of thought for two tasks of reasoning-gym, written by a program from what the package says of an item.

    chain_sum         8 - 3 + 6     8 - 3 = 5
                                    5 + 6 = 11
    letter_counting   "e" in "every green tree"    The letter "e" appears in every (2), green (2) and tree (2).
                                                   2 + 2 + 2 = 6

They are golden chains: for a warm-up (warmup.sft_target=chain_of_thought) and for objective=sft. The shipped examples
(conf/examples) are written in the same way, but the one of letter_counting has no sum: an untrained small model goes on
with lines of its own behind a second line, and forgets the marker.
"""

from collections.abc import Callable, Mapping
from typing import Any


def worked_chain(task: str, metadata: Mapping[str, Any]) -> str | None:
    """The chain of thought of an item; None for a task that has no such program.

    Args:
        metadata: the item's, of the package.
    """
    writer = WRITERS.get(task)
    return None if writer is None else writer(metadata)


def _chain_sum(metadata: Mapping[str, Any]) -> str:
    first, *rest = metadata["expression"].split(" ")
    lines, left = [], int(first)
    for operator, term in zip(rest[::2], rest[1::2], strict=True):
        result = left + int(term) if operator == "+" else left - int(term)
        lines.append(f"{left} {operator} {term} = {result}")
        left = result
    return "\n".join(lines) or f"{first} = {left}"


def _letter_counting(metadata: Mapping[str, Any]) -> str:
    letter = metadata["target_letter"]
    counts = [(word, word.lower().count(letter)) for word in metadata["span"]]
    *before, last = [f"{word} ({count})" for word, count in counts if count]
    words = f"{', '.join(before)} and {last}" if before else last
    terms = [str(count) for _, count in counts if count]
    total = f"\n{' + '.join(terms)} = {sum(map(int, terms))}" if before else ""
    return f'The letter "{letter}" appears in {words}.{total}'


WRITERS: dict[str, Callable[[Mapping[str, Any]], str]] = {"chain_sum": _chain_sum, "letter_counting": _letter_counting}
