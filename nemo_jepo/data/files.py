"""Rows of a JSONL or Parquet file, one at a time: question, answer, chain of thought.

A row that cannot be used is a `BadRow`, an ordinary item of the stream: what to do about it is the caller's choice. A
file that cannot be read on is an error, whatever the caller does about rows: what it still held would be missing.
"""

import json
import math
from collections.abc import Collection, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from nemo_jepo.config.errors import DataError, one_line
from nemo_jepo.config.reading import COPY_AGAIN, reason, unusable

LONGEST_LINE = 64 * 2**20
"""Bytes of one line of JSONL: a file without line ends, which holds no rows, is not read into memory as a whole."""


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
    cluster: str | None = None
    """What data.cluster_key says of it; None where nobody asks."""
    group: str | None = None
    """What data.group_key says of it; None where nobody asks."""


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
        return one_line(f"{self.source}:{self.line}: {field}{self.problem}")


@dataclass(frozen=True, slots=True)
class Unreadable:
    """In the place of a row's record: why there is none."""

    problem: str


@dataclass(frozen=True, slots=True)
class Keys:
    """Which fields of a row to read."""

    prompt: str
    answer: str
    chain_of_thought: str | None = None
    cluster: str | None = None
    verifiable: str | None = None
    """True or false; a row without it is verifiable."""
    group: str | None = None


def read_rows(path: Path, keys: Keys) -> Iterator[Row | BadRow]:
    """Every row of the file in order, the unusable ones as `BadRow`. Raises: see `read_records`."""
    columns = [key for key in astuple(keys) if key is not None]
    for line, record in read_records(path, columns):
        yield record if isinstance(record, BadRow) else _row(str(path), line, record, keys)


def read_records(path: Path, columns: Collection[str]) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """(line, fields) of every row in order, a `BadRow` where it has no fields.

    Args:
        columns: those that are read of a Parquet file, where it has them; a line of JSONL has all of its fields.
    Raises:
        DataError: the name ends in neither .jsonl nor .parquet; no regular file is there; the file is not Parquet
            although its name says so; or it cannot be read to its end, with the row that was reached.
    """
    if path.suffix not in (".jsonl", ".parquet"):
        raise DataError(f"{path}: must end in .jsonl or .parquet. Convert or rename the file.")
    if (fault := unusable(path)) is not None:
        raise DataError(f"{path}: {'. '.join(fault)}.")
    for line, record in _jsonl(path) if path.suffix == ".jsonl" else _parquet(path, columns):
        if isinstance(record, dict):
            yield line, record
        else:
            problem = record.problem if isinstance(record, Unreadable) else "not a JSON object"
            yield line, BadRow(str(path), line, None, problem)


def _jsonl(path: Path) -> Iterator[tuple[int, object]]:
    """(line, value); blank lines are passed over."""
    line = 0
    try:
        with path.open("rb") as file:
            while raw := file.readline(LONGEST_LINE + 1):
                line += 1
                if len(raw) > LONGEST_LINE:
                    raise DataError(f"{path}:{line}: longer than {LONGEST_LINE:,} bytes. Write one row on each line.")
                if raw.strip():
                    yield line, _json(raw)
    except OSError as error:
        raise _broken_off(path, line, error) from error


def _json(raw: bytes) -> object:
    try:
        return json.loads(raw)
    except RecursionError as error:
        return Unreadable(reason(error))
    except ValueError as error:  # also of an integer of more than 4300 digits
        return Unreadable("a number of too many digits" if "digits" in str(error) else "not a JSON object")


def _broken_off(path: Path, line: int, error: BaseException) -> DataError:
    return DataError(f"{path}: cannot be read beyond row {line:,} ({reason(error)}). {COPY_AGAIN}.")


def _parquet(path: Path, wanted: Collection[str]) -> Iterator[tuple[int, object]]:
    """(row, record) with only the columns that are wanted."""
    import pyarrow.parquet  # JSONL needs none of it

    line = 0
    try:
        file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
    except Exception as error:  # damage shows in errors of Arrow, of the system, of Unicode and of memory
        kind = f"not a Parquet file ({reason(error)})"
        raise DataError(f"{path}: {kind}. Give the path of one, or of a .jsonl file.") from error
    try:
        with file:
            columns = [name for name in file.schema_arrow.names if name in wanted]
            for batch in file.iter_batches(columns=columns):
                for record in _records(batch):
                    line += 1
                    yield line, record
            promised = file.metadata.num_rows
    except Exception as error:  # likewise
        raise _broken_off(path, line, error) from error
    if line != promised:
        raise DataError(f"{path}: cannot be read beyond row {line:,} of {promised:,}. {COPY_AGAIN}.")


def _records(batch: Any) -> list[Any]:
    """The batch's rows; one whose values Python cannot hold (no UTF-8, a date beyond its calendar) by itself."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if len(batch) == 1:
            return [Unreadable(f"cannot be read ({reason(error)})")]
    half = len(batch) // 2
    return _records(batch.slice(0, half)) + _records(batch.slice(half))


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
    cluster, problem = (None, "") if keys.cluster is None else _text(record, keys.cluster)
    if problem:
        return BadRow(source, line, keys.cluster, problem)
    group, problem = (None, "") if keys.group is None else _text(record, keys.group)
    if problem:
        return BadRow(source, line, keys.group, problem)
    verifiable = None if keys.verifiable is None else record.get(keys.verifiable)
    if not isinstance(verifiable, bool | None):
        return BadRow(source, line, keys.verifiable, f"must be true or false, is {_brief(verifiable)}")
    return Row(source, line, question, answer.strip(), chain_of_thought, verifiable is not False, None, cluster, group)


def _text(record: dict[str, object], key: str) -> tuple[str, str]:
    """(text, "") or ("", problem). A finite number is read as its decimal text."""
    if key not in record:
        return "", f"missing; the row has {', '.join(sorted(record))[:200] or 'no field'}"
    value = record[key]
    if isinstance(value, int) and not isinstance(value, bool) or isinstance(value, float) and math.isfinite(value):
        value = str(value)
    if not isinstance(value, str):
        return "", f"must be a string or a number, is {_brief(value)}"
    if not value.strip():
        return "", "empty"
    if any("\ud800" <= character <= "\udfff" for character in value):
        return "", "holds half of a surrogate pair, which is no text"
    return value, ""


def _brief(value: object) -> str:
    """The beginning of a value as JSON."""
    try:
        return json.dumps(value, default=str)[:40]
    except (RecursionError, TypeError, ValueError):
        return f"a {type(value).__name__}"
