"""How hard each question is for a model, read from a file of pass rates; and the rows of a range of difficulties."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, median

import pyarrow

from nemo_jepo.config.errors import ConfigError, DataError
from nemo_jepo.data.files import BadRow, read_records
from nemo_jepo.tools.prepare.records import Example, Splits
from nemo_jepo.tools.prepare.steps import Account, Step, dropped, exact_number
from nemo_jepo.tools.prepare.text import question_key
from nemo_jepo.utils.files import sha256_of

RATES = ("pass_rate", "accuracy")
"""The columns that hold the share of right answers; the first that a row has is read."""


@dataclass(slots=True)
class Tried:
    """What the file says of one question."""

    question: str | None = None
    """None where the file names the id alone."""
    pass_rates: list[float] = field(default_factory=list)
    """One for each of its rows."""

    @property
    def difficulty(self) -> float:
        """1 - mean of the pass rates, to 9 decimals, so that a pass rate of 0.9 is a difficulty of 0.1."""
        return round(1 - mean(self.pass_rates), 9)


Table = Mapping[str, Tried]
"""By "id ..." and by "question ..."."""


def read_pass_rates(path: Path) -> Table:
    """The pass rates of a JSONL or Parquet file; the rows of one question are averaged, so one row a sample will do.

    A row has `id` (of a prepared row), `question`, or both, and `pass_rate` or `accuracy`: from 0 to 1, or true, false.

    Raises:
        DataError: a row without such fields, or with another question than an earlier one of its id; a file that
            cannot be read, or without a row.
    """
    table: dict[str, Tried] = {}
    for line, record in read_records(path, ("id", "question", *RATES)):
        problem = record.problem if isinstance(record, BadRow) else _enter(table, record)
        if problem:
            raise DataError(f"{path}:{line}: {problem}. Mend the row, or take it out.")
    if not table:
        raise DataError(f"{path}: no row. Give a file with pass rates.")
    return table


def _enter(table: dict[str, Tried], record: Mapping[str, object]) -> str:
    """Adds a row to the table; else says what is wrong with it."""
    row_id, question = record.get("id"), record.get("question")
    if isinstance(row_id, int) and not isinstance(row_id, bool):
        row_id = str(row_id)
    if question is not None and not isinstance(question, str) or row_id is not None and not isinstance(row_id, str):
        return "id and question must be text"
    key = question_key(question) if question else None
    if not row_id and not key:
        return "neither id nor question"
    rate = next((record[name] for name in RATES if record.get(name) is not None), None)
    if not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
        return f"{' or '.join(RATES)} must be a number from 0 to 1"
    tried = table.setdefault(f"id {row_id}" if row_id else f"question {key}", Tried(key))
    if tried.question != key:
        return f"id {row_id!r} stands for another question in an earlier row"
    tried.pass_rates.append(float(rate))
    return ""


def difficulty_of(row_id: str, example: Example, table: Table) -> float | None:
    """The row's difficulty, by its id, else by its question; None where the file says nothing of it.

    Raises:
        DataError: the file has another question under this id: it is of another data set.
    """
    key = question_key(example.question)
    tried = table.get(f"id {row_id}") or table.get(f"question {key}")
    if tried is None:
        return None
    if tried.question not in (None, key):
        raise DataError(f"--difficulty: id {row_id!r} has another question there. Give the file of this data set.")
    return tried.difficulty


def difficulty_step(path: Path) -> Step:
    """--difficulty FILE. Errors: see `read_pass_rates` and `difficulty_of`, and a file that knows no row."""
    table, checksum = read_pass_rates(path), sha256_of(path)

    def apply(splits: Splits) -> tuple[Splits, Account]:
        splits = {
            split: [
                (row_id, replace(example, difficulty=difficulty_of(row_id, example, table))) for row_id, example in rows
            ]
            for split, rows in splits.items()
        }
        found = [example.difficulty for rows in splits.values() for _, example in rows]
        known = [difficulty for difficulty in found if difficulty is not None]
        if not known:
            raise DataError(f"{path}: knows no row of this data set. Name its rows by id or by question.")
        account = {
            "file": str(path),
            "sha256": checksum,
            "rows_with": len(known),
            "rows_without": len(found) - len(known),
        }
        account |= {"min": min(known), "median": median(known), "max": max(known)}
        says = f"{len(known)} of {len(found)} rows have one, from {min(known):.3g} to {max(known):.3g}"
        return splits, account | {"says": f"{says}, median {median(known):.3g}"}

    return Step("difficulty", apply, column=pyarrow.field("difficulty", pyarrow.float64()))


def keep_difficulty_step(value: str) -> Step:
    """--keep-difficulty LOW:HIGH: training rows in the range stay, ends included; one without a difficulty goes.

    Raises:
        ConfigError: no range within 0 and 1.
    """
    option, rule, example = "--keep-difficulty", "must be LOW:HIGH, two decimal numbers from 0 to 1", "0.1:0.9"
    low, _, high = value.partition(":")
    least, most = (float(exact_number(option, end, rule, example)) for end in (low, high))
    if least > most:
        raise ConfigError(option, value, "begins above its end", f"Give for example {example}")

    def apply(splits: Splits) -> tuple[Splits, Account]:
        found = [example.difficulty for _, example in splits["train"]]
        stays = [difficulty is not None and least <= difficulty <= most for difficulty in found]
        without = found.count(None)
        account = {"least": least, "most": most, "without_difficulty": without}
        return dropped(splits, stays, account, f" ({without} of them without a difficulty)" if without else "")

    return Step("keep_difficulty", apply, drops=True)
