"""The generated chains, read back from their text by an oracle that shares no code with the generator."""

import dataclasses
import re
from collections import Counter

import pytest

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import AnswerConfig, ArithmeticConfig, DataConfig
from nemo_jepo.data.arithmetic import arithmetic_rows
from nemo_jepo.data.dataset import load_prompts
from nemo_jepo.data.files import Row


def value(question: str) -> int:
    """7+5*3-2= left to right over the integers, by Python, and mod 10 only at the end."""
    first, *steps = re.findall(r"^\d|[-+*]\d", question.removesuffix("="))
    return eval("(" * len(steps) + first + "".join(f"{step})" for step in steps)) % 10


def steps_follow(row: Row) -> bool:
    """Whether the chain goes through the question's own operations, each from the result before it."""
    steps = [re.fullmatch(r"(\d)([-+*]\d)=(\d)", step).groups() for step in row.chain_of_thought.split(" ")]
    befores, operations, results = zip(*steps, strict=True)
    return befores[0] + "".join(operations) + "=" == row.question and befores[1:] == results[:-1]


def wrong_steps(row: Row) -> int:
    return sum(eval(step.split("=")[0]) % 10 != int(step[-1]) for step in row.chain_of_thought.split(" "))


@pytest.mark.parametrize("split", ["train", "validation", "warmup"])
@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_the_answer_is_the_value_of_the_question(split, num_steps):
    config = ArithmeticConfig(num_steps=num_steps, num_train=500, num_validation=100)
    rows = arithmetic_rows(config, split, seed=5)
    assert len(rows) == (100 if split == "validation" else 500)
    for row in rows:
        assert re.fullmatch(rf"\d([-+*]\d){{{num_steps}}}=", row.question)
        assert row.answer == str(value(row.question))


def test_chains_of_several_lengths_have_each_as_often_and_their_cluster_is_their_number_of_steps():
    config = ArithmeticConfig(min_steps=2, num_steps=4, num_train=3000, num_validation=90)
    train, validation, warmup = (arithmetic_rows(config, split, seed=5) for split in ("train", "validation", "warmup"))
    for row in (*train, *validation, *warmup):
        assert row.cluster == str(len(re.findall("[-+*]", row.question)))
        assert row.answer == str(value(row.question))
    lengths = Counter(row.cluster for row in train)
    assert set(lengths) == {"2", "3", "4"} and max(abs(count - 1000) for count in lengths.values()) < 80  # 3 sigma
    assert not {row.question for row in train} & {row.question for row in validation}
    assert [row.question for row in train] == [row.question for row in warmup]
    few = arithmetic_rows(dataclasses.replace(config, num_train=100), "train", seed=5)
    assert few == train[:100]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_golden_chain_has_every_step_right_and_ends_in_the_answer(split):
    for row in arithmetic_rows(ArithmeticConfig(num_train=500), split, seed=5):
        assert steps_follow(row) and wrong_steps(row) == 0
        assert row.chain_of_thought[-1] == row.answer


def test_the_warm_up_corpus_has_the_shares_asked_for_and_no_wrong_chain_leads_to_the_answer():
    config = ArithmeticConfig(num_train=1000, right_share=0.35, corrupted_share=0.45)
    rows = arithmetic_rows(config, "warmup", seed=5)
    with_chain = [row for row in rows if row.chain_of_thought is not None]
    wrong = [row for row in with_chain if wrong_steps(row) > 0]
    assert (len(with_chain), len(wrong)) == (800, 450)
    assert all(steps_follow(row) for row in with_chain)
    assert all(wrong_steps(row) == 1 and row.chain_of_thought[-1] != row.answer for row in wrong)
    assert all(row.chain_of_thought[-1] == row.answer for row in with_chain if wrong_steps(row) == 0)
    assert len({row.chain_of_thought is None for row in rows[:50]}) == 2  # in random order, not in blocks


@pytest.mark.parametrize("answers", ["short", "derivation"])
def test_an_answer_may_follow_a_corrupted_chain_and_nothing_else_changes(answers):
    config = ArithmeticConfig(num_train=200, right_share=0.3, corrupted_share=0.4, answers=answers)
    follows = dataclasses.replace(config, corrupted_answer="follows")
    for split in ("train", "validation"):
        assert arithmetic_rows(follows, split, seed=5) == arithmetic_rows(config, split, seed=5)
    pairs = list(zip(*(arithmetic_rows(it, "warmup", seed=5) for it in (config, follows)), strict=True))
    for row, following in pairs:
        wrong = row.chain_of_thought is not None and wrong_steps(row) > 0
        assert dataclasses.replace(following, answer=row.answer) == row and (following.answer != row.answer) == wrong
        if following.chain_of_thought is not None:
            chain = row.chain_of_thought
            assert re.search(r"\d", following.answer)[0] == chain[-1]
            assert answers == "short" or re.findall(r"\d[-+*]\d=\d", following.answer) == chain.split(" ")


def test_shares_that_round_up_together_still_fit():
    rows = arithmetic_rows(ArithmeticConfig(num_train=3, right_share=0.5, corrupted_share=0.5), "warmup", seed=5)
    assert len(rows) == 3 and all(row.chain_of_thought for row in rows)


@pytest.mark.parametrize("num_slips", [1, 2, 4])
def test_a_corrupted_chain_has_as_many_wrong_steps_as_asked_for(num_slips):
    config = ArithmeticConfig(num_train=300, right_share=0, corrupted_share=1, corrupted_steps=num_slips)
    for row in arithmetic_rows(config, "warmup", seed=5):
        assert steps_follow(row) and wrong_steps(row) == num_slips and row.chain_of_thought[-1] != row.answer


def test_a_slip_may_stand_at_every_step():
    rows = arithmetic_rows(ArithmeticConfig(num_train=500, right_share=0, corrupted_share=1), "warmup", seed=5)
    places = {[eval(s[:-2]) % 10 == int(s[-1]) for s in row.chain_of_thought.split(" ")].index(False) for row in rows}
    assert places == {0, 1, 2, 3}


def test_validation_is_unseen_distinct_and_warm_up_asks_what_training_asks():
    config = ArithmeticConfig(num_steps=1, num_train=2000, num_validation=100)  # 300 questions: chance would collide
    train, validation, warmup = (
        [r.question for r in arithmetic_rows(config, s, 5)] for s in ("train", "validation", "warmup")
    )
    assert not set(train) & set(validation)
    assert len(set(validation)) == 100
    assert train == warmup


@pytest.mark.parametrize("split", ["train", "validation", "warmup"])
def test_mixed_answers_have_the_share_of_problems_in_words_that_was_asked_for(split):
    config = ArithmeticConfig(num_train=500, num_validation=100, answers="mixed", in_words_share=0.4)
    rows = arithmetic_rows(config, split, seed=5)
    in_words = [row for row in rows if not row.verifiable]
    assert len(in_words) == 0.4 * len(rows)
    assert all(re.fullmatch(r"[a-z ]+", row.question) and not re.search(r"\d", row.answer) for row in in_words)
    assert all(re.fullmatch(r"\d", row.answer) for row in rows if row.verifiable)
    assert len({row.answer for row in in_words}) > 20  # 10 values, several phrases each
    assert len({row.verifiable for row in rows[:30]}) == 2  # in random order, not in blocks


def test_only_the_writing_differs_between_the_forms_of_answers():
    """The same problems, the same slips: regimes differ in nothing else."""
    short, mixed, derivation = (
        arithmetic_rows(ArithmeticConfig(num_train=200, answers=answers), "warmup", 5)
        for answers in ("short", "mixed", "derivation")
    )
    for plain, either, sentences in zip(short, mixed, derivation, strict=True):
        assert (sentences.question, sentences.chain_of_thought) == (plain.question, plain.chain_of_thought)
        assert not sentences.verifiable and sentences.answer.count(".") == 5  # the result, four steps
        if either.verifiable:
            assert either == plain
        elif plain.chain_of_thought is not None:
            assert len(either.chain_of_thought.split()) == 4 * 5  # two plus three is five


def test_the_seed_decides_everything():
    config = ArithmeticConfig(num_train=50)
    assert arithmetic_rows(config, "warmup", 5) == arithmetic_rows(config, "warmup", 5)
    assert arithmetic_rows(config, "warmup", 5) != arithmetic_rows(config, "warmup", 6)


def test_too_much_validation_for_so_few_questions_is_an_error():
    with pytest.raises(ConfigError, match="data.arithmetic.num_validation=151: only 300 chains"):
        arithmetic_rows(ArithmeticConfig(num_steps=1, num_validation=151), "train", 5)


def test_arithmetic_needs_no_file(tokenizer):
    config = DataConfig(name="arithmetic", arithmetic=ArithmeticConfig(num_train=20, num_validation=10))
    config.num_validation_prompts = 5
    sizes = [
        len(load_prompts(config, split, tokenizer, AnswerConfig()).prompts)
        for split in ("train", "validation", "warmup")
    ]
    assert sizes == [20, 5, 20]
    prompt = load_prompts(config, "train", tokenizer, AnswerConfig()).prompts[0]
    assert tokenizer.decode(list(prompt.token_ids)) == prompt.question + "\n"
