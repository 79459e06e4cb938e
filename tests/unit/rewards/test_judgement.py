"""Judgements: how they are read, and what two of a pair earn together."""

import itertools

import pytest

from nemo_jepo.held_out import judged_pairs
from nemo_jepo.rewards.judgement import JudgementVerifier, consistent, is_right, pair_rewards, partner_of, score
from nemo_jepo.types import Prompt


def prompt(number: int, answer: str, group: str | None, occurrence: int = 0) -> Prompt:
    return Prompt(number, (1,), "q", answer, group_key=group, occurrence=occurrence)


ORDERS = [prompt(0, "A", "x"), prompt(1, "B", "x")]


@pytest.mark.parametrize(
    ("own", "reference", "expected"),
    [
        ("A", "A", True),
        ("[[B]]", "A", False),
        (" **[[ A ]]**. ", "A", True),
        ("(B)", "B", True),
        ("A or B", "A", None),
        ("a", "A", None),
        ("Answer A", "A", None),
        ("A: 7.5, B: 3", "A", True),
        ("A: 7.5/10, B: 8/10.", "A", False),
        ("A = 3; B = 3", "A", False),
        ("A: 3, B: 3", "B", False),
        ("A: 11, B: 3", "A", None),
        ("A: 7.55, B: 3", "A", None),
        ("", "A", None),
        ("correct", "correct", True),
        ("Wrong.", "wrong", True),
        ("wrong", "correct", False),
        ("not correct", "correct", None),
        ("7", "good", None),
    ],
)
def test_a_judgement_is_read_as_a_whole_or_not_at_all(own, reference, expected):
    assert is_right(own, reference) is expected
    assert JudgementVerifier().is_right(own, prompt(0, reference, "x")) is expected


@pytest.mark.parametrize(
    ("own", "expected"),
    [("7", 7.0), ("7.5/10", 7.5), ("10", 10.0), ("0", 0.0), ("10.1", None), ("seven", None), ("-1", None)],
)
def test_a_score_is_from_0_to_10(own, expected):
    assert score(own) == expected


def test_both_orders_must_be_right_and_the_order_of_the_two_does_not_matter():
    """Every combination of two verdicts: only A on the first order and B on the second earns anything."""
    for first, second in itertools.product(("A", "B"), repeat=2):
        earned = pair_rewards(ORDERS, {(0, 0): first, (1, 0): second})
        assert set(earned.values()) == {float((first, second) == ("A", "B"))}
        swapped = pair_rewards(ORDERS[::-1], {(0, 0): second, (1, 0): first})
        assert swapped == {(0, 0): earned[1, 0], (1, 0): earned[0, 0]}


def test_a_judgement_that_cannot_be_read_is_no_verdict_and_one_that_is_missing_is_wrong():
    unread = pair_rewards(
        ORDERS, {(0, 0): "who knows", (1, 0): "B", (0, 1): "A", (1, 1): "?", (0, 2): "B", (1, 2): "?"}
    )
    assert unread == {(0, 0): None, (1, 0): None, (0, 1): None, (1, 1): None, (0, 2): 0.0, (1, 2): None}
    missing = pair_rewards(ORDERS, {(0, 0): None, (1, 0): "B", (0, 1): " ", (1, 1): "B"})
    assert set(missing.values()) == {0.0}
    assert pair_rewards(ORDERS, {(0, 0): "A"}) == {(0, 0): None}  # its partner never arrived


def test_scores_of_single_answers_are_right_together_where_the_good_one_is_higher():
    pair = [prompt(0, "good", "x"), prompt(1, "bad", "x")]
    answers = {
        (0, 0): "8",
        (1, 0): "3.5",
        (0, 1): "3",
        (1, 1): "3",
        (0, 2): "2",
        (1, 2): "9",
        (0, 3): "8",
        (1, 3): "low",
    }
    earned = pair_rewards(pair, answers)
    assert [earned[0, sample] for sample in range(4)] == [1.0, 0.0, 0.0, None]
    assert [earned[1, sample] for sample in range(4)] == [1.0, 0.0, 0.0, None]
    assert consistent("8", "3", "good", "good") is None


def test_partners_are_of_one_group_and_of_one_turn():
    twice = [prompt(0, "A", "x"), prompt(1, "B", "x"), prompt(0, "A", "x", 1), prompt(1, "B", "x", 1)]
    assert partner_of(twice) == [1, 0, 3, 2]
    assert partner_of([prompt(0, "A", "y"), *ORDERS, prompt(3, "B", "y")]) == [3, 2, 1, 0]
    for broken in (ORDERS[:1], [*ORDERS, prompt(2, "A", "x")], [prompt(0, "A", None)] * 2):
        with pytest.raises(ValueError, match="a pair of judgements has two"):
            partner_of(broken)


def test_held_out_pairs_say_whether_the_judge_follows_the_place():
    answers = {
        **{(0, 0): "A", (1, 0): "B"},  # right
        **{(0, 1): "A", (1, 1): "A"},  # always the first
        **{(0, 2): "B", (1, 2): "A"},  # wrong
        **{(0, 3): "A", (1, 3): "hm"},  # cannot be read
        **{(0, 4): "A"},  # the other never arrived
    }
    found = judged_pairs(ORDERS, answers)
    assert found == {"consistent_accuracy": (1.0, 4.0), "one_sided_rate": (1.0, 4.0), "unread_rate": (1.0, 9.0)}
