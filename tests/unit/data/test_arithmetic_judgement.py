"""Generated judgements, read back from their text by an oracle that shares no code with the generator."""

import re
from collections import Counter

import pytest

from nemo_jepo.config.schema import ArithmeticConfig
from nemo_jepo.data.arithmetic import arithmetic_rows
from nemo_jepo.data.arithmetic_judgement import PROMPT
from nemo_jepo.data.files import Row
from nemo_jepo.data.oracle import is_true

PARTS = re.compile(re.sub(r"\\\{\w+\\\}", "(.+)", re.escape(PROMPT)))
SETTINGS = {"num_steps": 2, "num_train": 400, "num_validation": 100}


def parts(row: Row) -> tuple[str, str]:
    """Reference answer and answer."""
    found = PARTS.fullmatch(row.question)
    assert found
    return found[1], found[2]


def rows_of(split: str, **settings: object) -> list[Row]:
    return arithmetic_rows(ArithmeticConfig(**SETTINGS, answers="judgement", **settings), split, seed=5)


@pytest.mark.parametrize("split", ["train", "validation", "warmup"])
def test_a_pair_has_a_correct_and_a_wrong_answer_to_one_problem_beside_one_reference_answer(split):
    rows = rows_of(split)
    problems = arithmetic_rows(ArithmeticConfig(**SETTINGS, answers="mixed"), split, seed=5)
    assert len(rows) == 2 * len(problems) == 2 * (100 if split == "validation" else 400)
    assert [row.group for row in rows] == [f"pair/{line // 2}" for line in range(len(rows))]
    assert [row.line for row in rows] == list(range(1, len(rows) + 1))
    for problem, good, bad in zip(problems, rows[::2], rows[1::2], strict=True):
        (reference, one), (same, other) = parts(good), parts(bad)
        assert (reference, good.answer, bad.answer) == (same, "correct", "wrong")
        assert is_true(problem.question, reference, derivation=False) and is_true(problem.question, one, False)
        assert not is_true(problem.question, other, derivation=False)
    in_words = [parts(row) for row in rows if not row.question.endswith(tuple(f"{n}\nCorrect?" for n in range(10)))]
    assert len(in_words) == 2 * round(0.4 * len(problems))
    assert sum(reference == own for reference, own in in_words) < len(in_words) / 5  # correct, in other words


def test_a_golden_chain_reads_both_values_and_says_by_how_much_they_differ():
    problems = arithmetic_rows(ArithmeticConfig(**SETTINGS, answers="mixed"), "train", seed=5)
    for problem, row in zip([problem for problem in problems for _ in range(2)], rows_of("train"), strict=True):
        reference, own, difference = re.fullmatch(r"(\d)-(\d)=(\d)", row.chain_of_thought).groups()
        assert is_true(problem.question, reference, False)
        assert (int(own) + int(difference)) % 10 == int(reference)
        own_is_true = is_true(problem.question, parts(row)[1], False)
        assert (difference == "0") == (row.answer == "correct") == own_is_true


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
        reference, read, _ = re.findall(r"\d", row.chain_of_thought)
        misread = ("correct" if reference == read else "wrong") != true
        kinds["corrupted" if misread else "right"] += 1
        assert row.answer == (turned if misread and corrupted_answer == "follows" else true)
    assert kinds == {"right": 240, "corrupted": 400, "absent": 160}
