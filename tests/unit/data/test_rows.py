"""JSONL and Parquet rows: what is read, and how a row that cannot be used is named."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from nemo_jepo.config.errors import ConfigError, DataError
from nemo_jepo.config.schema import AnswerConfig, DataConfig
from nemo_jepo.data.dataset import load_prompts, training_texts
from nemo_jepo.data.files import BadRow, Keys, read_rows

GOOD = {"question": "What is 6 * 7?", "answer": "42", "thought": "six times seven"}


def jsonl(folder: Path, *rows: object) -> str:
    """A file with one line per row; text is written as it stands."""
    path = folder / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "row, field, problem",
    [
        ("{'question': 1}", None, "not a JSON object"),
        ("[1, 2]", None, "not a JSON object"),
        ({"answer": "42"}, "question", "missing; the row has answer"),
        ({"question": "?"}, "answer", "missing; the row has question"),
        ({"question": "?", "answer": " \n"}, "answer", "empty"),
        ({"question": "?", "answer": ["42"]}, "answer", 'must be a string or a number, is ["42"]'),
        ({"question": "?", "answer": True}, "answer", "must be a string or a number, is true"),
        ({"question": "?", "answer": None}, "answer", "must be a string or a number, is null"),
        ('{"question": "?", "answer": NaN}', "answer", "must be a string or a number, is NaN"),
        ({"question": "?", "answer": "\ud800"}, "answer", "half of a surrogate pair"),
        ({"question": "?", "answer": "42"}, "thought", "missing; the row has answer, question"),
        ({"question": "?", "answer": "42", "thought": ["42"]}, "thought", "must be a string"),
        ({"question": "x " * 90, "answer": "42", "thought": ""}, "question", "more than data.max_prompt_tokens=60"),
        ({"question": "?", "answer": "x " * 30, "thought": ""}, "answer", "more than data.max_answer_tokens=20"),
    ],
)
def test_a_bad_row_is_an_error_that_names_file_line_field_and_remedy(tmp_path, tokenizer, row, field, problem):
    path = jsonl(tmp_path, GOOD, "", row, GOOD)
    settings = {"train_path": path, "chain_of_thought_key": "thought", "max_prompt_tokens": 60, "max_answer_tokens": 20}
    with pytest.raises(DataError) as error:
        load_prompts(DataConfig(**settings), "train", tokenizer, AnswerConfig())
    assert str(error.value).startswith(f"{path}:3: " + (f"field {field!r}: " if field else ""))
    assert problem in str(error.value)
    assert str(error.value).endswith("leave such rows out with data.on_bad_row=skip.")

    dataset = load_prompts(DataConfig(**settings, on_bad_row="skip"), "train", tokenizer, AnswerConfig())
    assert [prompt.prompt_id for prompt in dataset.prompts] == [0, 3]
    (bad,) = dataset.bad_rows
    assert isinstance(bad, BadRow) and (bad.source, bad.line, bad.field) == (path, 3, field)


def test_bytes_that_are_not_utf8_are_a_bad_row(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"question": "\xff", "answer": "1"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:1: not a JSON object"):
        load_prompts(DataConfig(train_path=str(path)), "train", tokenizer, AnswerConfig())


def test_a_prompt_holds_its_row(tmp_path, tokenizer):
    path = jsonl(tmp_path, GOOD, {"question": "7?", "answer": 7, "thought": None}, {"question": 8, "answer": " 8.5 "})
    config = DataConfig(train_path=path, prompt_template="Q: {question}\nA:")
    first, second, third = load_prompts(config, "train", tokenizer, AnswerConfig()).prompts
    assert (first.question, first.answer, first.chain_of_thought) == ("What is 6 * 7?", "42", None)
    assert tokenizer.decode(list(first.token_ids)) == "Q: What is 6 * 7?\nA:"
    assert (second.answer, third.question, third.answer) == ("7", "8", "8.5")

    config = DataConfig(train_path=jsonl(tmp_path, GOOD, {**GOOD, "thought": None}), chain_of_thought_key="thought")
    chains = [prompt.chain_of_thought for prompt in load_prompts(config, "train", tokenizer, AnswerConfig()).prompts]
    assert chains == ["six times seven", None]


def test_parquet_reads_as_jsonl_does(tmp_path, tokenizer):
    rows = [{"q": f"{i} + 1?", "a": str(i + 1), "c": None if i % 3 else f"{i} and 1", "other": i} for i in range(10)]
    rows[4]["a"] = ""
    parquet = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet, row_group_size=3)
    keys = {"prompt_key": "q", "answer_key": "a", "chain_of_thought_key": "c", "on_bad_row": "skip"}
    of_parquet = load_prompts(DataConfig(train_path=str(parquet), **keys), "train", tokenizer, AnswerConfig())
    of_jsonl = load_prompts(DataConfig(train_path=jsonl(tmp_path, *rows), **keys), "train", tokenizer, AnswerConfig())
    assert of_parquet.prompts == of_jsonl.prompts
    assert len(of_parquet.prompts) == 9
    ((of_parquet_bad,), (of_jsonl_bad,)) = (of_parquet.bad_rows, of_jsonl.bad_rows)
    assert (of_parquet_bad.line, of_parquet_bad.field, of_parquet_bad.problem) == (5, "a", "empty")
    assert (of_jsonl_bad.line, of_jsonl_bad.field, of_jsonl_bad.problem) == (5, "a", "empty")


def test_a_parquet_file_without_the_column_names_it(tmp_path, tokenizer):
    parquet = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "?"}]), parquet)
    with pytest.raises(DataError, match=r"rows.parquet:1: field 'question': missing"):
        load_prompts(DataConfig(train_path=str(parquet)), "train", tokenizer, AnswerConfig())


@pytest.mark.parametrize(
    "name, rule", [("rows.csv", "must end in .jsonl or .parquet"), ("rows.parquet", "not a Parquet file")]
)
def test_another_kind_of_file_is_refused(tmp_path, tokenizer, name, rule):
    (tmp_path / name).write_text("question,answer\n")
    with pytest.raises(DataError, match=rule):
        load_prompts(DataConfig(train_path=str(tmp_path / name)), "train", tokenizer, AnswerConfig())


def test_a_file_without_a_usable_row_is_an_error(tmp_path, tokenizer):
    with pytest.raises(DataError, match="no usable row"):
        load_prompts(DataConfig(train_path=jsonl(tmp_path, "")), "train", tokenizer, AnswerConfig())
    with pytest.raises(DataError, match=r"no usable row; the first of 2 bad rows is .*rows.jsonl:1"):
        load_prompts(
            DataConfig(train_path=jsonl(tmp_path, "x", "y"), on_bad_row="skip"), "train", tokenizer, AnswerConfig()
        )


def test_validation_takes_the_first_rows_of_its_own_file(tmp_path, tokenizer):
    train = jsonl(tmp_path, *({"question": "?", "answer": str(i)} for i in range(6)))
    (tmp_path / "held_out").mkdir()
    held_out = jsonl(tmp_path / "held_out", *({"question": "?", "answer": str(i)} for i in range(10, 16)))
    config = DataConfig(train_path=train, validation_path=held_out, num_validation_prompts=4)
    answers = {
        split: [prompt.answer for prompt in load_prompts(config, split, tokenizer, AnswerConfig()).prompts]
        for split in ("train", "warmup", "validation")
    }
    assert answers["validation"] == ["10", "11", "12", "13"]
    assert answers["train"] == answers["warmup"] == ["0", "1", "2", "3", "4", "5"]


def test_a_split_without_a_path_says_which_to_add(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match=r"data.validation_path=None: validation reads a file. Add"):
        load_prompts(DataConfig(train_path=jsonl(tmp_path, GOOD)), "validation", tokenizer, AnswerConfig())


def test_a_tokenizer_is_trained_on_everything_that_usable_training_rows_read_as(tmp_path):
    path = jsonl(tmp_path, GOOD, "bad", {"question": "7?", "answer": 7, "thought": None})
    texts = list(training_texts(DataConfig(train_path=path, chain_of_thought_key="thought")))
    assert texts == ["What is 6 * 7?\nsix times seven\n42", "7?\n7"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_row_says_whether_a_verifier_can_grade_it(tmp_path, suffix):
    values = [True, False, None]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        rows = [{"question": "q", "answer": "a", "verifiable": value} for value in values]
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"question": "q", "answer": "a"}]))
    else:
        table = {"question": ["q"] * 3, "answer": ["a"] * 3, "verifiable": values}
        pyarrow.parquet.write_table(pyarrow.table(table), path)
    found = [row.verifiable for row in read_rows(path, Keys("question", "answer", verifiable="verifiable"))]
    assert found[:3] == [True, False, True] and found[3:] == ([True] if suffix == ".jsonl" else [])
    assert all(row.verifiable for row in read_rows(path, Keys("question", "answer")))


def test_a_row_that_says_something_else_there_is_a_bad_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q", "answer": "a", "verifiable": "yes"}\n')
    (row,) = read_rows(path, Keys("question", "answer", verifiable="verifiable"))
    assert str(row) == f"{path}:1: field 'verifiable': must be true or false, is \"yes\""
