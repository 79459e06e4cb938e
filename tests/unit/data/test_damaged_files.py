"""Data files that cannot be read: a row by its number where there is one, the file otherwise, and never fewer rows."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from nemo_jepo.config.errors import DataError
from nemo_jepo.config.schema import AnswerConfig, DataConfig
from nemo_jepo.data import files
from nemo_jepo.data.dataset import load_prompts
from nemo_jepo.data.files import BadRow, Keys, Row, read_rows
from tests.support.small_tokenizers import small_tokenizer

KEYS = Keys("question", "answer")


def rows_of(path: Path, content: bytes) -> list[Row | BadRow]:
    path.write_bytes(content)
    return list(read_rows(path, KEYS))


def error_of(path: Path) -> str:
    """What is said of a file, whatever becomes of bad rows."""
    said = set()
    for on_bad_row in ("error", "skip"):
        config = DataConfig(train_path=str(path), on_bad_row=on_bad_row)
        with pytest.raises(DataError) as caught:
            load_prompts(config, "train", small_tokenizer("byte_level"), AnswerConfig())
        said.add(str(caught.value).replace(str(path), "FILE"))
    (line,) = said
    return line


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"[" * 5000, "nested too deeply"),
        (b'{"question": "x", "answer": ' + b"9" * 5000 + b"}", "a number of too many digits"),
        (b'{"question": "x", "answer": "\xff"}', "not a JSON object"),
        (b'{"question": "x", "answer": 1e999}', "field 'answer': must be a string or a number, is Infinity"),
        (
            b'{"question": {"a": ' + b"[" * 500 + b"]" * 500 + b"}}",
            "field 'question': must be a string or a number, is ",
        ),
        (b'{"a\\nb": 1}', "field 'question': missing; the row has a\\nb"),
    ],
)
def test_a_line_that_cannot_be_read_is_a_bad_row_and_the_next_one_is_read(line, problem, tmp_path):
    bad, good = rows_of(tmp_path / "rows.jsonl", line + b'\n{"question": "x", "answer": 1}')
    assert str(bad).startswith(f"{tmp_path}/rows.jsonl:1: {problem}") and str(bad).isprintable()
    assert isinstance(good, Row) and good.line == 2


def test_a_number_of_many_digits_is_read_to_the_last_one(tmp_path):
    (row,) = rows_of(tmp_path / "rows.jsonl", b'{"question": "x", "answer": ' + b"9" * 401 + b"}")
    assert isinstance(row, Row) and row.answer == "9" * 401


def test_a_file_without_line_ends_is_not_read_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_LINE", 100)
    (tmp_path / "rows.jsonl").write_bytes(b"\n" + b"x" * 101)
    assert error_of(tmp_path / "rows.jsonl") == "FILE:2: longer than 100 bytes. Write one row on each line."


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_what_is_no_regular_file_is_neither_opened_nor_waited_for(suffix, tmp_path):
    folder, fifo, zero = (tmp_path / f"{name}{suffix}" for name in ("folder", "fifo", "zero"))
    folder.mkdir()
    os.mkfifo(fifo)
    zero.symlink_to("/dev/zero")
    for path, kind in ((folder, "a folder"), (fifo, "a FIFO"), (zero, "a device")):
        assert error_of(path) == f"FILE: is {kind}, and only a regular file is read. Put the file itself there."


def parquet(path: Path, questions: object, **options: object) -> bytes:
    table = pa.table({"question": questions, "answer": [str(i) for i in range(len(questions))]})
    pyarrow.parquet.write_table(table, path, **options)
    return path.read_bytes()


def test_a_parquet_value_that_is_no_text_spoils_its_own_row_alone(tmp_path):
    offsets = pa.py_buffer(b"".join(number.to_bytes(4, "little") for number in (0, 1, 3, 4)))
    parquet(
        tmp_path / "rows.parquet", pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xff\xfeb")])
    )
    first, bad, last = read_rows(tmp_path / "rows.parquet", KEYS)
    assert str(bad).startswith(f"{tmp_path}/rows.parquet:2: cannot be read ('utf-8' codec can't decode byte 0xff")
    assert [row.question for row in (first, last)] == ["a", "b"] and last.line == 3


def test_a_letter_changed_under_a_checksum_is_an_error_also_where_bad_rows_are_skipped(tmp_path):
    path = tmp_path / "rows.parquet"
    options = {"row_group_size": 10, "compression": "none", "use_dictionary": False, "write_page_checksum": True}
    whole = parquet(path, [f"question {i} of 30" for i in range(30)], **options)
    place = whole.index(b"question 25 of")
    path.write_bytes(whole[:place] + b"Q" + whole[place + 1 :])
    line = error_of(path)
    assert line.startswith("FILE: cannot be read beyond row 0 (") and line.endswith("). Copy the file again.")


def test_a_parquet_file_cut_short_is_one_line(tmp_path):
    path = tmp_path / "rows.parquet"
    whole = parquet(path, ["a", "b"])
    for size in (0, 4, len(whole) // 2, len(whole) - 9):
        path.write_bytes(whole[:size])
        assert error_of(path).startswith("FILE: not a Parquet file (")
