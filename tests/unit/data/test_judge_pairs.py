"""`data prepare judge_pairs`: which answers are paired, what is asked, and what a run reads of the files."""

import json
import random

import pyarrow.parquet
import pytest

from nemo_jepo.config.errors import ConfigError, DataError
from nemo_jepo.config.schema import AnswerConfig, DataConfig
from nemo_jepo.data.dataset import load_prompts
from nemo_jepo.tools.prepare import command
from nemo_jepo.tools.prepare.judge_pairs import FORMS, Judged, Row, with_neighbours
from tests.support.small_tokenizers import small_tokenizer

ROWS = [
    {"question": "What is 2 + 3 apples?", "answer": "5 apples", "bad": "6 apples"},
    {"question": "What is 2 + 4 apples?", "answer": "6 apples", "bad": "{question} {a}"},
    {"question": "Who wrote Faust?", "answer": "Goethe", "bad": "Schiller"},
]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(folder, rows, *options):
    file = jsonl(folder / "mine.jsonl", rows)
    assert command.main(["prepare", "judge_pairs", "--from", str(file), "--out", str(folder), *options]) == 0
    made = folder / "judge_pairs"
    splits = {path.stem: pyarrow.parquet.read_table(path).to_pylist() for path in made.glob("*.parquet")}
    return splits, json.loads((made / "manifest.json").read_text())


def neighbours(rows):
    return with_neighbours([Row(question, good, None, None) for question, good in rows])


def test_both_orders_of_every_pair_stand_side_by_side_under_one_group(tmp_path, capsys):
    splits, manifest = prepared(tmp_path, ROWS, "--bad-key", "bad", "--held-out", "1")
    assert [len(splits[split]) for split in ("train", "validation")] == [4, 2]
    assert manifest["pairs"] == 3 and manifest["bad_answers"] == "column bad"
    rows = splits["train"] + splits["validation"]
    assert [row["group"] for row in rows] == [f"pair/{number}" for number in (0, 0, 1, 1, 2, 2)]
    assert [row["answer"] for row in rows] == ["A", "B"] * 3
    for pair, (first, second) in zip(ROWS, zip(rows[::2], rows[1::2], strict=True), strict=True):
        a, b = f"Answer A:\n{pair['answer']}\n", f"Answer B:\n{pair['bad']}\n"
        assert a in first["question"] and b in first["question"]
        assert a.replace("A:", "B:") in second["question"] and b.replace("B:", "A:") in second["question"]
        assert all(f"Question:\n{pair['question']}\n" in row["question"] for row in (first, second))
    assert "judge_pairs/train.parquet  4 rows, 4 verifiable" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("form", "answers"),
    [("verdict", "AB"), ("scores", "AB"), ("score", ("good", "bad")), ("graded", ("correct", "wrong"))],
)
def test_every_form_asks_for_the_judgement_that_its_rows_expect(form, answers):
    made = list(FORMS[form](Judged("the question", "the good one", "the bad one")))
    assert [answer for _, answer in made] == list(answers)
    for text, _ in made:
        assert "the question" in text and "The final answer is" in text and "\0" not in text
    shown = [("the good one" in text, "the bad one" in text) for text, _ in made]
    assert shown == ([(True, True)] * 2 if form != "score" else [(True, False), (False, True)]) or form == "graded"
    if form == "graded":
        assert shown == [(True, False), (True, True)]


def test_a_good_answer_may_be_written_in_other_words_than_the_reference_answer(tmp_path):
    other_words = {"reference": "5", "answer": "five apples", "bad": "six apples"}
    as_bad = {"reference": "6", "answer": "six", "bad": "6"}  # no bad answer at all
    rows = [{"question": "What is 2 + 3?"} | other_words, {"question": "What is 2 + 4?"} | as_bad]
    options = ["--bad-key", "bad", "--form", "graded", "--reference-key", "reference"]
    splits, manifest = prepared(tmp_path, rows, *options)
    correct, wrong = (row["question"] for row in splits["train"])
    assert "Reference answer:\n5\n" in correct and "Answer:\nfive apples\n" in correct
    assert wrong == correct.replace("five apples", "six apples")
    assert manifest["rows_without_a_pair"] == {"equal": 1, "no_bad_answer": 0}


def test_answers_with_one_reference_answer_are_no_bad_ones_of_each_other(tmp_path):
    rows = [Row("how many cats", "two cats", None, "2"), Row("how many dogs", "a pair", None, "2")]
    assert with_neighbours(rows) == [None, None]
    assert with_neighbours([*rows, Row("how many birds", "three", None, "3")]) == ["three", "three", "two cats"]
    samples = jsonl(tmp_path / "samples.jsonl", [{"question": "how many cats", "answer": "2", "correct": False}] * 2)
    samples.write_text(samples.read_text() + '{"question": "how many cats", "answer": "9", "correct": false}\n')
    mine = [{"question": "how many cats", "answer": "two cats", "reference": "2"}]
    options = ["--bad-from", str(samples), "--form", "graded", "--reference-key", "reference"]
    splits, _ = prepared(tmp_path, mine, *options)
    assert "Answer:\n9\n" in splits["train"][1]["question"]


def test_a_neighbours_answer_is_that_of_the_question_with_most_words_in_common():
    questions = [
        "two plus three apples",
        "two plus four apples",
        "who wrote faust",
        "who wrote the faust book",
        "unlike",
    ]
    rows = [(question, f"answer {number}") for number, question in enumerate(questions)]
    assert neighbours(rows) == ["answer 1", "answer 0", "answer 3", "answer 2", None]
    equal = [("one two", "same"), ("one two three", "Same"), ("one four", "other")]
    assert neighbours(equal) == ["other", "other", "same"]


def test_rare_words_of_ones_own_and_twins_with_the_same_answer_hide_no_neighbour():
    """Nine words that nobody else has, and nine that only a twin has; "how" leads to the others."""
    own, twin = "aa bb cc dd ee ff gg hh ii", "jj kk ll mm nn oo pp qq rr"
    rows = [(f"how {own}", "1"), (f"how {twin}", "2"), (f"how {twin} again", "2"), ("what else", "3")]
    assert neighbours(rows) == ["2", "1", "1", None]


@pytest.mark.parametrize("seed", range(20))
def test_with_few_words_the_neighbour_is_the_one_of_all_others(seed):
    draw = random.Random(seed)
    rows = [(" ".join(draw.choices("abcdefg", k=4)), draw.choice("xyz")) for _ in range(12)]
    sets = [set(question.split()) for question, _ in rows]
    for place, found in enumerate(neighbours(rows)):
        likeness = {
            other: len(sets[place] & sets[other]) / len(sets[place] | sets[other])
            for other in range(12)
            if rows[other][1] != rows[place][1] and sets[place] & sets[other]
        }
        expected = max(likeness, key=lambda other: (likeness[other], -other), default=None)
        assert found == (None if expected is None else rows[expected][1])


def test_bad_answers_may_be_samples_that_are_known_to_be_wrong(tmp_path):
    samples = [
        {"question": "Who wrote Faust?", "answer": "Goethe", "correct": False},  # the good one itself
        {"question": "who wrote  faust?", "answer": "Heine", "correct": False},
        {"question": "What is 2 + 3 apples?", "answer": "5 apples", "correct": True},
    ]
    splits, manifest = prepared(tmp_path, ROWS, "--bad-from", str(jsonl(tmp_path / "samples.jsonl", samples)))
    assert len(splits["train"]) == 2 and "Heine" in splits["train"][0]["question"]
    assert manifest["rows_without_a_pair"] == {"no_bad_answer": 2}
    assert len(manifest["source"]["local_copy"]) == 2


def test_a_run_reads_the_groups(tmp_path):
    prepared(tmp_path, ROWS, "--bad-key", "bad")
    config = DataConfig(
        train_path=str(tmp_path / "judge_pairs" / "train.parquet"), group_key="group", verifier="judgement"
    )
    prompts = load_prompts(config, "train", small_tokenizer("byte_level"), AnswerConfig()).prompts
    assert [prompt.group_key for prompt in prompts] == [f"pair/{number}" for number in (0, 0, 1, 1, 2, 2)]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ([], "--bad-key, --bad-from=[None, None]: bad answers come from a column or from elsewhere"),
        (["--bad-key", "bad", "--bad-from", "neighbour"], "--bad-key, --bad-from=['bad', 'neighbour']: bad answers"),
        (["--bad-key", "worse"], "no column 'worse'; it has answer, bad, question. Name it by --prompt-key"),
        (["--bad-key", "bad", "--held-out", "3"], "--held-out=3: there are 3 pairs. Ask for at most 2"),
        (["--bad-key", "bad", "--select", "zip:2"], "--select='zip:2': is not of judge_pairs. Leave it out"),
        (["--bad-from", "none.jsonl"], "none.jsonl: cannot be read (No such file or directory)"),
        (["--bad-key", "bad", "--reference-key", "bad"], "--reference-key='bad': the form verdict shows no reference"),
        (["--bad-key", "answer"], "no row with text in question, answer"),
    ],
)
def test_what_does_not_go_together_is_one_line(options, line, tmp_path):
    with pytest.raises((ConfigError, DataError)) as caught:
        prepared(tmp_path, ROWS, *options)
    (said,) = str(caught.value).splitlines()
    assert line in said
    assert not (tmp_path / "judge_pairs").exists()


def test_its_options_are_of_no_other_set(tmp_path):
    with pytest.raises(ConfigError, match="--form='score': is of judge_pairs. Leave it out"):
        command.main(["prepare", "own", "--from", str(jsonl(tmp_path / "a.jsonl", ROWS)), "--form", "score"])
    with pytest.raises(ConfigError, match="the pairs are in a file"):
        command.main(["prepare", "judge_pairs", "--out", str(tmp_path)])
