"""Answers in boxes, labels around problems and proofs: each rule on text as the data sets have it."""

import pytest

from nemo_jepo.tools.prepare.cleaning import boxed_answer, without_labels, without_proof_environment


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"We get $x = \boxed{2}$.", "2"),
        (r"The sum is $\boxed{\frac{a^{2}+\sqrt{b}}{2}}$.", r"\frac{a^{2}+\sqrt{b}}{2}"),
        (r"First \boxed{3}, but the answer is $\boxed{4}$, not 3.", "4"),
        (r"So $\boxed{\left\{1, \frac{2}{3}\right\}}$.", r"\left\{1, \frac{2}{3}\right\}"),
        (r"Only one brace: $\boxed{\left\{ x \right.}$.", r"\left\{ x \right."),
        (r"Thus \fbox{12}.", "12"),
        (r"is $\boxed 5$.", "5"),
        (r"is \boxed 7.", "7"),
        (r"$\boxed { \text{(B) } 4 }$", r"\text{(B) } 4"),
        (r"\boxed{2} and then \boxed{3", "2"),
        ("no box at all", None),
        (r"\boxed{ }", None),
        (r"ends in \boxed", None),
    ],
)
def test_the_answer_is_the_content_of_the_last_box(solution, answer):
    assert boxed_answer(solution) == answer


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  \n Let $x>0$.", "Let $x>0$"),
        ("## Let $x>0$ . . ", "Let $x>0$"),
        ("Problem: Prove that $n$ is odd.", "Prove that $n$ is odd"),
        ("## Problem 3.\n\nProve it", "Prove it"),
        ("Problem 4 Let $ABC$ be acute", "Let $ABC$ be acute"),
        ("**Solution.** Suppose not", "Suppose not"),
        ("## Solution\n\nWe have $a=b$...", "We have $a=b$"),
        ("SOLUTION $x=1$", "$x=1$"),
        ("Solution 2: by induction", "by induction"),
        ("A1 Let $a, b$ be real", "Let $a, b$ be real"),
        ("G5. In triangle $ABC$", "In triangle $ABC$"),
        ("24. A6 (ROU) Let $a$", "Let $a$"),
        (r"5. N1 (IRN)$^{\mathrm{IMO} 1}$ Show", "Show"),
        ("13. (BUL 1) Prove", "Prove"),
        ("ROU Find all $f$", "Find all $f$"),
        (r"C3 \(S\) is a set", r"\(S\) is a set"),
        ("### Problem 2. C7 (USA) Problem: Let", "Let"),
        ("Solution.", ""),
        (" ## . ", ""),
    ],
)
def test_labels_before_and_blanks_and_dots_behind_are_removed(text, cleaned):
    assert without_labels(text) == cleaned


@pytest.mark.parametrize(
    "text",
    [
        "ABC is a triangle",
        "A1, B1 and C1 are points on the sides",
        "A1 B1 C1 is a triangle",
        "A1 is the midpoint of BC",
        "Solutions of the equation are sought",
        "Solution sets of both are equal",
        "Problems are posed",
        "5. Prove that $n$ is odd",
        "(a) Prove that $n$ is odd",
        "1.5 litres of water",
        "USA has 50 states",
        "Let A1. The Solution: $x$ ## 2",
    ],
)
def test_sentences_that_only_look_like_labels_stay(text):
    assert without_labels(text) == text


def test_a_proof_leaves_its_environment_and_another_text_stays():
    assert without_proof_environment("\\begin{proof}\n\n  Let $x$.\n\\end{proof} ") == "Let $x$."
    assert without_proof_environment(" By \\begin{proof}x\\end{proof} ") == "By \\begin{proof}x\\end{proof}"
