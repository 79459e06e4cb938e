"""What is known of a published data set: where its files are, what a row must have, and how it becomes an example."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Example:
    """One prepared row, before its `verifiable` flag and, where the data set has none, its id."""

    question: str
    answer: str
    chain_of_thought: str | None
    source: str
    """Where the question is from within the data set: a subject, a competition, a book."""
    id: str | None = None
    """None: <split>/<row number in the published split>."""
    difficulty: float | None = None
    """0 (always solved) to 1 (never), where --difficulty has one."""
    cluster: int | None = None
    """Where --cluster was asked for."""
    group: str | None = None
    """Of prompts that belong together (judge_pairs)."""


Rows = list[tuple[str, Example]]
"""(id, example), in the published order."""
Splits = dict[str, Rows]


HUB = "hf://datasets/{home}@{{revision}}/{files}"
"""Address of files on the Hugging Face Hub, without their revision."""

FILTERS = {
    "blank": "a column that is read holds no text",
    "not_a_proof": "neither question_type nor answer says proof",
    "proof": "question_type or answer says proof; see numina_proof",
    "marked_invalid": "problem_is_valid or solution_is_valid is not Yes",
    "no_answer": "the answer says notfound",
    "no_box": "the solution has no \\boxed{answer}",
    "no_final_answer": "the solution has no '#### final answer'",
    "no_integer": "the answer is no whole number",
    "nothing_left": "nothing is left of the problem or of the solution after cleaning",
    "repeated": "the question occurred before; differences of case and white space do not count",
}
"""Name of a filter -> which rows it drops. `repeated` is applied by the preparation, the others by `read`."""


@dataclass(frozen=True, slots=True)
class Published:
    """A data set as its authors publish it."""

    home: str
    revision: str
    licence: str
    files: Mapping[str, str]
    """Split -> address of its files at the revision, which stands for {revision}."""
    columns: tuple[str, ...]
    """What must be there."""
    read: Callable[[Row], Example | str]
    """The example of a row, or the filter that drops it."""
    filters: tuple[str, ...]
    """In the order of their application."""
    held_out: int = 0
    """Rows that become the validation split, where only a training split is published."""
    verified: bool = True
    """Ask the verifier about every answer. False for proofs: no answer is verifiable."""
    conditions: str = ""
    """What its authors ask of whoever uses it; the manifest and the command repeat it."""
    paper: str = ""
    """What arXiv 2503.19618 says of its own preparation."""
    paper_count: int | None = None
    """The paper's number of examples in all splits."""
    remedy: str = ""
    """What to do where a column is missing; empty: give a file with the columns of `home`."""


def as_text(value: object) -> str:
    """A text or a number as text, without outer blanks; empty for anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    return value.strip() if isinstance(value, str) else ""


def text_of(row: Row, column: str) -> str:
    """The text in a column, without outer blanks; empty for anything that is no text."""
    value = row[column]
    return value.strip() if isinstance(value, str) else ""
