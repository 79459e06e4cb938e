"""Rows of a JSONL or Parquet file, one at a time: question, answer, chain of thought.

A row that cannot be used is a `BadRow`, an ordinary item of the stream: what to do about it is the caller's choice.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo_jepo.config.errors import DataError


@dataclass(frozen=True, slots=True)
class Row:
    """One usable row, as text."""

    source: str
    """The file, or the name of a generated data set."""
    line: int
    """1-based: the line of a JSONL file, the row of a Parquet file."""
    question: str
    answer: str
    chain_of_thought: str | None = None
    verifiable: bool = True
    """Whether a verifier can tell if an own answer equals this one."""
    task_entry: str | None = None
    """data=reasoning_gym: the package's own record of the question, which its scorer reads; pickled, in base 64."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """One row that cannot be used: where it is, which field, what is wrong."""

    source: str
    line: int
    field: str | None
    """None where the whole row is unreadable."""
    problem: str

    def __str__(self) -> str:
        field = "" if self.field is None else f"field {self.field!r}: "
        return f"{self.source}:{self.line}: {field}{self.problem}"


@dataclass(frozen=True, slots=True)
class Keys:
    """Which fields of a row to read."""

    prompt: str
    answer: str
    chain_of_thought: str | None = None


def read_rows(path: Path, keys: Keys) -> Iterator[Row | BadRow]:
    """Every row of the file in order, the unusable ones as `BadRow`.

    Raises:
        DataError: the name ends in neither .jsonl nor .parquet, or the file is not Parquet although its name says so.
    """
    readers = {".jsonl": _jsonl, ".parquet": _parquet}
    if path.suffix not in readers:
        raise DataError(f"{path}: must end in .jsonl or .parquet. Convert or rename the file.")
    for line, record in readers[path.suffix](path, keys):
        if not isinstance(record, dict):
            yield BadRow(str(path), line, None, "not a JSON object")
        else:
            yield _row(str(path), line, record, keys)


def _jsonl(path: Path, keys: Keys) -> Iterator[tuple[int, object]]:
    """(line, value); blank lines are passed over, a line that is not JSON has the value None."""
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if raw.strip():
                try:
                    yield line, json.loads(raw)
                except ValueError:
                    yield line, None


def _parquet(path: Path, keys: Keys) -> Iterator[tuple[int, object]]:
    """(row, record) with only the columns that are read."""
    import pyarrow.parquet  # JSONL needs none of it

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file ({error}). Give the path of one, or of a .jsonl file.") from error
    with file:
        wanted = (keys.prompt, keys.answer, keys.chain_of_thought)
        columns = [name for name in file.schema_arrow.names if name in wanted]
        line = 0
        for batch in file.iter_batches(columns=columns):
            for record in batch.to_pylist():
                line += 1
                yield line, record


def _row(source: str, line: int, record: dict[str, object], keys: Keys) -> Row | BadRow:
    question, problem = _text(record, keys.prompt)
    if problem:
        return BadRow(source, line, keys.prompt, problem)
    answer, problem = _text(record, keys.answer)
    if problem:
        return BadRow(source, line, keys.answer, problem)
    key, chain_of_thought = keys.chain_of_thought, None
    if key is not None and not (key in record and record[key] in (None, "")):
        chain_of_thought, problem = _text(record, key)
        if problem:
            return BadRow(source, line, key, problem)
    return Row(source, line, question, answer.strip(), chain_of_thought)


def _text(record: dict[str, object], key: str) -> tuple[str, str]:
    """(text, "") or ("", problem). A finite number is read as its decimal text."""
    if key not in record:
        return "", f"missing; the row has {', '.join(sorted(record)) or 'no field'}"
    value = record[key]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)
    if not isinstance(value, str):
        return "", f"must be a string or a number, is {json.dumps(value, default=str)[:40]}"
    if not value.strip():
        return "", "empty"
    if any("\ud800" <= character <= "\udfff" for character in value):
        return "", "holds half of a surrogate pair, which is no text"
    return value, ""
