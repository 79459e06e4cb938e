"""The oracle of generated problems knows the truth in every form."""

import pytest

from nemo_jepo.config.schema import ArithmeticConfig
from nemo_jepo.data.arithmetic import arithmetic_rows
from nemo_jepo.data.arithmetic_text import NUMBERS, PHRASES
from nemo_jepo.data.oracle import is_true
from nemo_jepo.rewards.verify import Verifier

DERIVATION = "We obtain 6. First, 7+5=2. Then, 2*3=6."
FALSE_DERIVATIONS = {
    "another result": DERIVATION.replace("obtain 6", "obtain 5"),
    "two results": DERIVATION.replace("obtain 6", "obtain 6 or 5"),
    "a wrong step": DERIVATION.replace("7+5=2", "7+5=3"),
    "a step left out": "We obtain 6. Then, 2*3=6.",
    "a step too many": f"{DERIVATION} Then, 6+0=6.",
    "steps in another order": "We obtain 6. First, 2*3=6. Then, 7+5=2.",
    "the result alone": "6",
    "nothing": "",
}


@pytest.mark.parametrize("answers", ["short", "mixed", "derivation"])
@pytest.mark.parametrize("split", ["train", "validation", "warmup"])
def test_every_reference_answer_is_true(answers, split):
    rows = arithmetic_rows(ArithmeticConfig(num_train=300, answers=answers), split, seed=3)
    assert all(is_true(row.question, row.answer, answers == "derivation") for row in rows)


def test_the_answer_to_another_question_is_true_only_where_the_values_agree():
    rows = arithmetic_rows(ArithmeticConfig(num_train=300), "train", seed=3)
    agree = [row.answer == other.answer for row, other in zip(rows, rows[1:], strict=False)]
    found = [is_true(row.question, other.answer, False) for row, other in zip(rows, rows[1:], strict=False)]
    assert found == agree and set(agree) == {True, False}


@pytest.mark.parametrize("own", ["4", "four", "Four.", "it comes to four", "4, all in all"])
def test_a_value_is_true_in_digits_words_and_phrases(own):
    assert is_true("4*4*4+0=", own, derivation=False)
    assert is_true("four times four times four plus zero", own, derivation=False)
    assert not is_true("4*4*4+1=", own, derivation=False)


@pytest.mark.parametrize("own", ["", "none", "44", "4 or 5", "four four", "fourteen"])
def test_no_value_or_several_are_not_true(own):
    assert not is_true("4+0=", own, derivation=False)


def test_a_derivation_needs_its_result_and_every_step_in_any_words():
    assert is_true("7+5*3=", DERIVATION, derivation=True)
    assert is_true("7+5*3=", "It is 6. 7+5=2 and so 2*3=6", derivation=True)


@pytest.mark.parametrize("fault", FALSE_DERIVATIONS)
def test_a_derivation_is_false_with(fault):
    assert not is_true("7+5*3=", FALSE_DERIVATIONS[fault], derivation=True)


def test_the_verifier_takes_no_phrase_for_its_value_nor_for_another_phrase():
    """Why the rows with phrases are marked as not verifiable."""
    four, others = "4", [phrase.format(NUMBERS[4]) for phrase in PHRASES]
    with Verifier(5.0) as verifier:
        pairs = [(four, phrase) for phrase in others] + [(phrase, four) for phrase in others]
        pairs += [(others[0], phrase) for phrase in others[1:]] + [(four, DERIVATION), (DERIVATION, four)]
        assert verifier.verify(pairs) == [False] * len(pairs)
