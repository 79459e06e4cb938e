"""The page of the verifier: how often it and math-verify alone err on the pairs of tests/support/answer_pairs.py.

python tools/verifier_page.py > docs/reference/verifier.md
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from nemo_jepo.rewards.process import WorkerFault, WorkerProcess
from nemo_jepo.rewards.verify import Verifier
from tests.support.answer_pairs import PAIRS, Pair
from tests.support.later_answer_pairs import LATER_PAIRS

CPU_LIMIT_S = 5.0  # as in evaluation.verify_timeout_s: five times what the slowest pair with an end takes

HEAD = r"""# The verifier

<!-- Generated: make reference -->

The verifier says whether a sample's own answer equals the reference answer. It gives `rloo` and `jepo_rl` their
reward and evaluation its `accuracy`.

## What counts as right

An own answer must make **one claim**, and the reference answer must make the same. `nemo_jepo/rewards/claims.py`
reads claims; they are functions of text alone.

1. **Turn.** What follows a special token (`<|im_end|>`) or begins another question (`Question:`) is not part of the
   answer.
2. **Marks.** Markdown, dollars, `\(`, `\text{...}` and spacing say how it looks. They are deleted wherever they
   stand.
3. **Head and rest.** The head is the content of `\boxed{...}`, else the first sentence. The rest may comment on it:
   it may repeat the head's number, name no other one, and hold none of the words that deny, doubt or change (*not*,
   *wait*, *maybe*, *or*).
4. **Choices.** One letter, alone or as the label of an option; or yes, no, true, false.
5. **Values.** Anything else without words is mathematics: one or more values with an optional name (`x =`) and unit
   (`cm`). Two values are a claim too and differ from one: `42 or 43` equals `42, 43` and not 42. Where both answers
   have a name or a unit, they are the same; a percentage equals its number and a hundredth of it.
6. **Text.** What is left equals the same text, without differences of case and the full stop.

Decimal numbers are compared exactly. math-verify is asked about all other values, one at a time, without its own
search for mathematics inside of text: it is content with what it finds first, and `not 42` holds a 42. A decimal is a
fraction to it, so 0.333333 is not 1/3.

## Faults

It runs in a process of its own. One pair may take `evaluation.verify_timeout_s` seconds of CPU time, however busy the
machine is, and 4 GiB of memory; a library that fails on it is a fault as well. A worker that uses no CPU time for ten
minutes is ended. A fault is never a reward, and never better than a wrong answer: `rloo` and `jepo_rl` leave the
sample out of its group, and `accuracy` counts it as not right.

## Pairs
"""

PAIRS_HEAD = """\
Own answers beside reference answers, with the verdict of a careful human reader, are in
`tests/support/answer_pairs.py`. A false positive (FP) is called right and is not; a false negative (FN) is right and
called wrong. The pairs of the last two rows were written after the rules. These had called 3 right that are not, all in
the first of the two, and refused 16 and 21 that are right; then they were changed for some of them.
"""


@dataclass(frozen=True, slots=True)
class Judged:
    """One pair and two verdicts on it; a fault is None."""

    pair: Pair
    alone: bool | None
    ours: bool | None


def judged(topics: Mapping[str, Sequence[Pair]]) -> dict[str, list[Judged]]:
    """Every pair with the verdicts of math-verify alone and of the verifier."""
    with WorkerProcess("tests.support.math_verify_alone", CPU_LIMIT_S) as alone, Verifier(CPU_LIMIT_S) as verifier:

        def of(pair: Pair) -> Judged:
            try:
                verdict = alone.ask(list(pair[:2]))
            except WorkerFault:
                verdict = None
            return Judged(pair, verdict, verifier.verify([pair[:2]])[0])

        return {topic: [of(pair) for pair in pairs] for topic, pairs in topics.items()}


def errors(verdicts: Sequence[Judged], name: str) -> tuple[int, int]:
    """False positives and false negatives of `alone` or `ours`."""
    positive = sum(getattr(one, name) is True and not one.pair[2] for one in verdicts)
    return positive, sum(getattr(one, name) is not True and one.pair[2] for one in verdicts)


def page(first: Mapping[str, Sequence[Judged]], later: Mapping[str, Sequence[Judged]]) -> str:
    """The whole page."""
    everything = [one for verdicts in [*first.values(), *later.values()] for one in verdicts]
    lines = [
        HEAD,
        PAIRS_HEAD,
        "| pairs | number | math-verify alone: FP | FN | verifier: FP | FN |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for topic, verdicts in [*first.items(), *later.items()]:
        counts = (len(verdicts), *errors(verdicts, "alone"), *errors(verdicts, "ours"))
        lines.append(f"| {topic} | {' | '.join(map(str, counts))} |")
    lines += ["", "Right, and refused by the verifier:", "", "| own answer | reference answer |", "| --- | --- |"]
    lines += [_row(one) for one in everything if one.pair[2] and one.ours is not True]
    lines += [
        "",
        "Not right, and accepted by math-verify alone:",
        "",
        "| own answer | reference answer |",
        "| --- | --- |",
    ]
    lines += [_row(one) for one in everything if not one.pair[2] and one.alone is True]
    return "\n".join(lines) + "\n"


def _row(one: Judged) -> str:
    own, reference = (f"``{text.replace(chr(10), ' ⏎ ').replace('|', chr(92) + '|')}``" for text in one.pair[:2])
    return f"| {own} | {reference} |"


if __name__ == "__main__":
    print(page(judged(PAIRS), judged(LATER_PAIRS)), end="")
