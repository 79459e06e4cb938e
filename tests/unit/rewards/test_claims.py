"""What an answer claims, as text. Which claims are equal is proved on pairs, in tests/e2e/test_verify.py."""

import pytest

from nemo_jepo.rewards.claims import Value, as_claim, as_reference, is_changing
from nemo_jepo.rewards.marks import plain


@pytest.mark.parametrize(
    "own", ["42", "**42**.", r"$\boxed{42}$", "x = 42 cm", "42. I hope it is correct.", "42<|im_end|>"]
)
def test_an_answer_with_one_value_claims_it(own):
    (value,) = as_claim(own).values
    assert value.sides == ("42",)


@pytest.mark.parametrize("own", ["42. Wait, 41", "42. Is it?", "42\n41", r"\boxed{42} \boxed{41}", r"not \boxed{42}"])
def test_an_answer_that_doubts_or_takes_back_claims_nothing(own):
    assert as_claim(own) is None


@pytest.mark.parametrize(
    "own",
    ["not 42", "42?", "42, but I was wrong.", "42 tenths", "Paris", "42 is wrong", r"\approx 42", "4 2", "", "  "],
)
def test_what_is_not_mathematics_alone_is_text(own):
    assert as_claim(own).kind == "text"


def test_two_values_are_one_claim_of_two():
    for own in ("41 or 42", "41, 42", "x = 41 or x = 42", r"\{41, 42\}", "41 and 42"):
        assert [value.sides for value in as_claim(own).values] == [("41",), ("42",)]
    assert [value.sides for value in as_claim(r"1 \pm x").values] == [("1 + x",), ("1 - x",)]
    assert len(as_claim("(41, 42)").values) == 1  # a point


def test_name_sides_unit_and_relation_of_a_value():
    assert as_claim("v = 40 + 2 = 42 m/s").values == (Value("v = 40 + 2 = 42", "v", ("40 + 2", "42"), False, "m/s"),)
    (bound,) = as_claim("x > 2").values
    assert bound.is_relation and bound.sides == ("x > 2",)


@pytest.mark.parametrize(
    ("own", "choice"), [("B", "b"), ("(B)", "b"), ("B) 42", "b"), ("Option B.", "b"), ("**Yes**.", "yes")]
)
def test_a_letter_a_label_and_a_truth_value_are_choices(own, choice):
    claim = as_claim(own)
    assert (claim.kind, claim.text) == ("choice", choice)


def test_a_reference_answer_is_read_as_a_whole():
    assert as_reference("42. Or not?").kind == "text"
    assert as_reference(r"\boxed{42}").values[0].sides == ("42",)


def test_marks_are_deleted_and_characters_become_latex():
    assert plain("**x\N{SUPERSCRIPT TWO}**").split() == ["x^{2}"]
    assert plain(r"\(\dfrac12\)").split() == [r"\frac{1}{2}"]
    assert plain(r"1\,000").split() == ["1000"]


def test_words_that_change_a_claim():
    assert all(map(is_changing, ("isn't", "it isn\N{RIGHT SINGLE QUOTATION MARK}t", "Maybe", "forty-two", "NOT")))
    assert not any(map(is_changing, ("I hope it is correct", "note", r"\neg", "")))
