"""Which answers are flagged as verifiable, and that no answer can hold up the others."""

import pytest

from nemo_jepo.rewards.verifiable import another_answer, in_another_writing, verifiable_answers

pytestmark = pytest.mark.quick


GRADABLE = [
    "7",
    r"\frac{1}{2}",
    "$x+1$",
    r"\{1,2\}",
    r"(-\infty,2)\cup(3,4]",
    "f(x)=cx",
    "1,000",
    r"12 \mathrm{~cm}^2",
    "B",
    "6 and 8",
]
UNGRADABLE = ["Paris", "no solution", r"\text{even}", "$f(x) = 0$ for all $x$", "all odd primes"]
THE_PAPERS_EXAMPLE = r"\forall x \in \mathbb{R}, x^2 + (a-1)x + 1 \geq 0"
ENDLESS = "9^{9^{9^{9}}}"


def test_mathematics_is_verifiable_and_words_and_half_read_statements_are_not(capsys):
    answers = [*GRADABLE, *UNGRADABLE, THE_PAPERS_EXAMPLE, ENDLESS, *GRADABLE]
    flags = verifiable_answers(answers, num_workers=2, cpu_limit_s=2.0)
    expected = [True] * len(GRADABLE) + [False] * (len(UNGRADABLE) + 1) + [None] + [True] * len(GRADABLE)
    assert dict(zip(answers, flags, strict=True)) == dict(zip(answers, expected, strict=True))
    assert flags[-len(GRADABLE) :] == [True] * len(GRADABLE)
    assert f"{len(set(answers))}/{len(set(answers))}" in capsys.readouterr().err  # every distinct answer once


def test_no_answers_need_no_worker():
    assert verifiable_answers([], num_workers=1) == []


@pytest.mark.parametrize(
    ("answer", "same", "other"),
    [
        ("12", r"\boxed{12}", r"\boxed{22}"),
        ("$x^9$", r"\boxed{x^9}", r"\boxed{x^8}"),
        ("x", r"\boxed{x}", r"\boxed{x+1}"),
        ("$a$ and $b$", r"\boxed{$a$ and $b$}", r"\boxed{$a$ and $b$+1}"),
    ],
)
def test_an_answer_is_tried_in_another_writing_and_against_another_answer(answer, same, other):
    assert (in_another_writing(answer), another_answer(answer)) == (same, other)
