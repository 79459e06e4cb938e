"""Generated judgements, read back from their text by an oracle that shares no code with the generator."""

import re
from collections import Counter

import pytest

from nemo_jepo.config.judge import GRADE_PROMPT
from nemo_jepo.config.schema import ArithmeticConfig
from nemo_jepo.data.arithmetic import arithmetic_rows
from nemo_jepo.data.files import Row
from nemo_jepo.data.oracle import is_true

PARTS = re.compile(re.sub(r"\\\{\w+\\\}", "(.+)", re.escape(GRADE_PROMPT)))


def parts(row: Row) -> tuple[str, str, str]:
    """Question, reference answer and answer."""
    found = PARTS.fullmatch(row.question)
    assert found
    return found[1], found[2], found[3]


def rows_of(split: str, **settings: object) -> list[Row]:
    config = ArithmeticConfig(num_steps=2, num_train=400, num_validation=100, answers="judgement", **settings)
    return arithmetic_rows(config, split, seed=5)


@pytest.mark.parametrize("split", ["train", "validation", "warmup"])
def test_a_pair_has_a_correct_and_a_wrong_answer_to_one_problem_beside_one_reference_answer(split):
    rows = rows_of(split)
    assert len(rows) == 2 * (100 if split == "validation" else 400)
    assert [row.group for row in rows] == [f"pair/{line // 2}" for line in range(len(rows))]
    assert [row.line for row in rows] == list(range(1, len(rows) + 1))
    for good, bad in zip(rows[::2], rows[1::2], strict=True):
        (question, reference, one), (same, too, other) = parts(good), parts(bad)
        assert (question, reference, good.answer, bad.answer) == (same, too, "correct", "wrong")
        assert is_true(question, reference, derivation=False) and is_true(question, one, derivation=False)
        assert not is_true(question, other, derivation=False)
    in_words = [parts(row) for row in rows if not row.question.count("=")]
    assert len(in_words) == 2 * round(0.4 * len(rows) / 2)
    assert len([1 for _, reference, own in in_words if reference == own]) < len(in_words) / 5  # correct, in other words


def test_a_golden_chain_reads_both_values():
    for row in rows_of("train"):
        question, reference, own = parts(row)
        read = re.fullmatch(r"reference (\d), answer (\d)", row.chain_of_thought)
        assert is_true(question, read[1], False)
        assert (read[1] == read[2]) == (row.answer == "correct") == is_true(question, own, False)


@pytest.mark.parametrize("corrupted_answer", ["right", "follows"])
def test_a_misread_answer_turns_the_verdict_of_the_chain_round(corrupted_answer):
    rows = rows_of("warmup", right_share=0.3, corrupted_share=0.5, corrupted_answer=corrupted_answer)
    kinds: Counter[str] = Counter()
    for row in rows:
        true, turned = ("correct", "wrong") if row.line % 2 else ("wrong", "correct")
        if row.chain_of_thought is None:
            kinds["absent"] += 1
            assert row.answer == true
            continue
        reference, read = re.findall(r"\d", row.chain_of_thought)
        misread = ("correct" if reference == read else "wrong") != true
        kinds["corrupted" if misread else "right"] += 1
        assert row.answer == (turned if misread and corrupted_answer == "follows" else true)
    assert kinds == {"right": 240, "corrupted": 400, "absent": 160}
