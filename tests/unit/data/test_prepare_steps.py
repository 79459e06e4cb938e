"""The steps of `data prepare` beyond its filters: which rows and columns they change, and what the manifest says."""

import hashlib
import json
from importlib.util import find_spec

import pyarrow.parquet
import pytest

from nemo_jepo.config.errors import ConfigError, DataError
from nemo_jepo.config.schema import AnswerConfig, DataConfig
from nemo_jepo.data.dataset import load_prompts
from nemo_jepo.data.files import Keys
from nemo_jepo.tools.prepare import cluster, command
from nemo_jepo.tools.prepare.decontaminate import decontaminate_step
from nemo_jepo.tools.prepare.difficulty import difficulty_step, keep_difficulty_step
from nemo_jepo.tools.prepare.duplicates import near_duplicates_step
from nemo_jepo.tools.prepare.origin import Origin
from nemo_jepo.tools.prepare.prepare import SCHEMA, prepare
from nemo_jepo.tools.prepare.select_zip import select_step
from tests.support.published_rows import AIME25, MATH, MATH500, NUMINA, write

LONG = "one two three four five six seven eight nine ten"


def judge(answers):
    return [True] * len(answers)


def prepared(name, out, origin, *steps):
    """(split -> rows, manifest)."""
    folder = prepare(name, out, judge, origin, steps)
    rows = {path.stem: pyarrow.parquet.read_table(path).to_pylist() for path in folder.glob("*.parquet")}
    return rows, json.loads((folder / "manifest.json").read_text())


def math_files(folder, train, test=("Test?",)):
    """A local copy of MATH with these questions."""
    for split, problems in (("train", train), ("test", test)):
        write(folder / f"{split}.jsonl", *(MATH | {"problem": problem} for problem in problems))
    return Origin(folder)


def asked(rows):
    return [row["question"] for row in rows]


def test_without_steps_files_and_manifest_say_nothing_of_them(tmp_path):
    rows, manifest = prepared("math", tmp_path, math_files(tmp_path / "MATH", ["A?", "A?"]))
    assert list(manifest) == ["name", "source", "filters", "paper", "files", "columns", "prepared_by"]
    assert manifest["columns"] == list(rows["train"][0]) == SCHEMA.names and len(rows["train"]) == 2


def test_training_rows_that_share_words_with_an_evaluation_set_go_and_the_sets_are_named(tmp_path):
    """A prepared NAME, a folder, of which train counts not, and a file."""
    out = tmp_path / "out"
    prepared("math500", out, Origin(write(tmp_path / "m.jsonl", MATH500 | {"problem": f"Is it {LONG}?"})))
    write(tmp_path / "own" / "test.jsonl", {"question": "Who is there?"}, {"question": "Other?"})
    write(tmp_path / "own" / "train.jsonl", {"question": "Stays?"})
    file = write(tmp_path / "held.parquet", {"question": "WHO is   there"})

    origin = math_files(tmp_path / "MATH", [f"{LONG}, or not?", "Who is there?", "Stays?"], [f"{LONG}!"])
    step = decontaminate_step(f"math500,{tmp_path}/own,{file}", "9", out)
    rows, manifest = prepared("math", out, origin, step)
    assert asked(rows["train"]) == ["Stays?"] and asked(rows["test"]) == [f"{LONG}!"]
    (account,) = manifest["steps"]
    files = {
        "math500/test.parquet": (out / "math500" / "test.parquet", 1),
        f"{tmp_path}/own/test.jsonl": (tmp_path / "own" / "test.jsonl", 2),
        str(file): (file, 1),
    }
    assert account["sets"] == [
        {
            "set": name,
            "questions": number,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "training_rows_that_share": 1,
        }
        for name, (path, number) in files.items()
    ]
    assert (account["step"], account["ngram"]) == ("decontaminate", 9)
    assert (account["rows_before"], account["rows_after"]) == (3, 1)
    assert account["says"].startswith("2 of 3 training rows dropped (1 for math500/test.parquet, 1 for ")


def test_near_duplicates_go_before_rows_are_held_out_so_that_no_validation_row_resembles_a_training_row(tmp_path):
    problems = [f"{LONG} {number} {end}" for number in range(20) for end in ("", "", "really")]
    path = write(tmp_path / "numina.jsonl", *(NUMINA | {"problem": problem} for problem in problems))
    rows, manifest = prepared("numina", tmp_path / "out", Origin(path), near_duplicates_step("0.85"))
    assert (len(rows["train"]), len(rows["validation"])) == (18, 2)
    assert {tuple(question.split()[:11]) for split in rows.values() for question in asked(split)} == {
        tuple(f"{LONG} {number}".split()) for number in range(20)
    }
    assert manifest["steps"] == [
        {
            "step": "near_duplicates",
            "threshold": 0.85,
            "shingle_words": 5,
            "rows_before": 40,  # `repeated` dropped 20 before
            "rows_after": 20,
            "says": "20 of 40 training rows dropped",
        }
    ]


def test_every_split_has_a_difficulty_and_training_rows_of_the_range_stay(tmp_path):
    problems = {"Q0": 1.0, "Q1": 0.9, "Q2": 0.5, "Q3": 0.1, "Q4": 0.05, "unknown": None, "T": 0.0}
    rates = [{"question": q, "pass_rate": rate} for q, rate in problems.items() if rate is not None]
    path = write(tmp_path / "rates.jsonl", *rates)
    origin = math_files(tmp_path / "MATH", list(problems)[:-1], ["T"])
    steps = difficulty_step(path), keep_difficulty_step("0.1:0.9")
    rows, manifest = prepared("math", tmp_path / "out", origin, *steps)
    assert [(row["question"], row["difficulty"]) for row in rows["train"]] == [("Q1", 0.1), ("Q2", 0.5), ("Q3", 0.9)]
    assert [row["difficulty"] for row in rows["test"]] == [1.0]
    joined, kept = manifest["steps"]
    assert joined == {
        "step": "difficulty",
        "file": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "rows_with": 6,
        "rows_without": 1,
        "min": 0.0,
        "median": 0.7,
        "max": 1.0,
        "says": "6 of 7 rows have one, from 0 to 1, median 0.7",
    }
    assert (kept["rows_before"], kept["rows_after"], kept["without_difficulty"]) == (6, 3, 1)
    assert kept["says"] == "3 of 6 training rows dropped (1 of them without a difficulty)"


def test_a_selection_keeps_the_published_order_and_clusters_count_every_split(tmp_path):
    same, other = "apples and pears in a basket of fruit", "the train leaves the station at speed"
    origin = math_files(tmp_path / "MATH", [same, same, same, other], [other] * 5)
    steps = select_step("zip:2"), cluster.cluster_step("2")
    rows, manifest = prepared("math", tmp_path / "out", origin, *steps)
    assert [(row["question"], row["cluster"]) for row in rows["train"]] == [(same, 1), (other, 0)]
    assert [row["cluster"] for row in rows["test"]] == [0] * 5
    chosen, grouped = manifest["steps"]
    assert (chosen["method"], chosen["rows_before"], chosen["rows_after"]) == ("zip", 4, 2)
    assert [group["rows"] for group in grouped["clusters"]] == [6, 1] and grouped["says"] == "2 clusters of 1 to 6 rows"
    again, _ = prepared("math", tmp_path / "again", origin, *steps)
    assert again == rows


def test_a_file_of_ones_own_has_the_columns_that_the_user_names(tmp_path, tokenizer):
    path = write(
        tmp_path / "mine.csv",
        {"ask": "One?", "say": 1, "why": "It is.", "id": "x-1"},
        {"ask": "Two?", "say": 2, "why": "", "id": ""},
        {"ask": "", "say": 3, "why": "", "id": "x-3"},
    )
    rows, manifest = prepared("own", tmp_path / "out", Origin(path, keys=Keys("ask", "say", "why")))
    first = {"question": "One?", "answer": "1", "chain_of_thought": "It is.", "verifiable": True, "source": "own"}
    assert rows == {
        "train": [
            first | {"id": "x-1"},
            first | {"question": "Two?", "answer": "2", "chain_of_thought": None, "id": "train/1"},
        ]
    }
    assert manifest["source"]["home"] == "a file of one's own, its columns ask, say, why"
    assert manifest["filters"]["train"][0]["rows_after"] == 2
    config = DataConfig(train_path=str(tmp_path / "out" / "own" / "train.parquet"))
    assert len(load_prompts(config, "train", tokenizer, AnswerConfig()).prompts) == 2


# ---- what is refused, always before anything is written


def refused(kind, tmp_path, *arguments):
    with pytest.raises(kind) as caught:
        command.main(["prepare", *map(str, arguments), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists() and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--near-duplicates", "0"],
            "--near-duplicates='0': must be a decimal number above 0 and at most 1. Give for example 0.8.",
        ),
        (
            ["--near-duplicates", "4/5"],
            "--near-duplicates='4/5': must be a decimal number above 0 and at most 1. Give for example 0.8.",
        ),
        (["--ngram", "9"], "--ngram='9': has no --decontaminate to act on. Add --decontaminate, or drop it."),
        (
            ["--keep-difficulty", "0:1"],
            "--keep-difficulty='0:1': has no --difficulty to act on. Add --difficulty, or drop it.",
        ),
        (["--select", "best:5"], "--select='best:5': must be zip:N. Give for example zip:10000."),
        (["--select", "zip:0"], "--select zip:N='0': must be a whole number from 1. Give for example 10000."),
        (["--cluster", "1"], "--cluster='1': must be a whole number from 2. Give for example 20."),
        (["--embed", "m"], "--embed='m': has no --cluster to act on. Add --cluster, or drop it."),
        (
            ["--cluster", "2", "--embed", "/nowhere"],
            "--embed='/nowhere': cannot be read (No such file or directory). Give a model's folder.",
        ),
        (["--answer-key", "a"], "--answer-key='a': math has columns of its own. Leave it out, or prepare own."),
    ],
)
def test_a_wrong_option_is_one_line(tmp_path, arguments, line):
    assert refused(ConfigError, tmp_path, "math", *arguments) == line


@pytest.mark.parametrize("value", ["0.5", "0.9:0.1", "-1:0.5", "0.1:1.5", "a:b", "0.1:0.2:0.3"])
def test_a_range_of_difficulties_is_two_numbers_from_0_to_1(value):
    with pytest.raises(ConfigError, match="Give for example 0.1:0.9"):
        keep_difficulty_step(value)


def test_an_evaluation_set_that_is_not_there_says_how_to_prepare_it(tmp_path):
    line = refused(ConfigError, tmp_path, "math", "--decontaminate", "math500")
    out = tmp_path / "out"
    assert line.startswith(f"--decontaminate='math500': 'math500' is no file or folder, nor is {out}/math500. Give a")
    assert line.endswith(f"or prepare it first: nemo-jepo data prepare math500 --out {out}.")
    (tmp_path / "empty").mkdir()
    line = refused(ConfigError, tmp_path, "math", "--decontaminate", tmp_path / "empty")
    assert "holds no file of an evaluation split" in line


def test_an_evaluation_file_with_a_row_without_a_question_is_named(tmp_path):
    path = write(tmp_path / "e.jsonl", {"question": "Who?"}, {"problem": "Who?"})
    line = refused(DataError, tmp_path, "math", "--decontaminate", path)
    assert line == f"{path}:2: field 'question': missing; the row has problem. Mend the row, or take it out."
    path.write_text("")
    assert refused(DataError, tmp_path, "math", "--decontaminate", path).startswith(f"{path}: no row.")


def test_a_set_without_a_training_split_loses_no_row(tmp_path):
    path = write(tmp_path / "a.jsonl", AIME25)
    for arguments in (["--near-duplicates", "0.8"], ["--select", "zip:1"]):
        line = refused(ConfigError, tmp_path, "aime25", "--from", path, *arguments)
        option = arguments[0]
        assert line == (f"NAME='aime25': {option} drops training rows, and this set has none. Leave out {option}.")


def test_steps_that_leave_nothing_or_know_nothing_are_refused(tmp_path):
    math_files(tmp_path / "MATH", ["A?", "B?"])
    every = write(tmp_path / "e.jsonl", {"question": "A"}, {"question": "B"})
    line = refused(DataError, tmp_path, "math", "--from", tmp_path / "MATH", "--decontaminate", every)
    assert line.startswith(f"2 of 2 training rows dropped (2 for {every}): none is left.")
    rates = write(tmp_path / "r.jsonl", {"question": "C", "accuracy": 1})
    line = refused(DataError, tmp_path, "math", "--from", tmp_path / "MATH", "--difficulty", rates)
    assert line == f"{rates}: knows no row of this data set. Name its rows by id or by question."
    line = refused(ConfigError, tmp_path, "math", "--from", tmp_path / "MATH", "--select", "zip:3")
    assert line == "--select='zip:3': 2 training rows are left. Ask for at most 2."


def test_a_file_of_ones_own_must_be_there_with_its_columns(tmp_path):
    assert refused(ConfigError, tmp_path, "own").startswith("--from=None: the rows of your own are in a file.")
    path = write(tmp_path / "mine.jsonl", {"question": "Who?", "reply": "Me"})
    line = refused(DataError, tmp_path, "own", "--from", path)
    assert line.startswith(f"{path}: no column 'answer'; it has question, reply. Name the columns with --prompt-key,")


def test_clusters_without_scikit_learn_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "find_spec", lambda name: None if name == "sklearn" else find_spec(name))
    line = refused(ConfigError, tmp_path, "math", "--cluster", "3")
    assert line.startswith("--cluster='3': scikit-learn is not installed. pip install 'nemo_jepo[cluster]'")
