"""Solved examples that stand in front of every question, so that a model writes chains and answers as they do."""

from dataclasses import dataclass
from pathlib import Path

from nemo_jepo.config.errors import DataError
from nemo_jepo.config.schema import AnswerConfig
from nemo_jepo.data.files import Keys, Row, read_rows

KEYS = Keys("question", "answer", "chain_of_thought")
"""The fields of a row, whatever data.prompt_key and its like say of the training file."""


@dataclass(frozen=True, slots=True)
class Example:
    """One question with the completion that a model is shown."""

    question: str
    completion: str
    """Chain of thought, the marker on a line of its own, the answer: as `Splicer.supervised` writes a target."""


def solved_examples(path: Path, answer: AnswerConfig) -> tuple[Example, ...]:
    """Every row of the file, in order.

    Raises:
        DataError: a row that cannot be used (file, line, field), or no row.
    """
    examples = []
    for row in read_rows(path, KEYS):
        if not isinstance(row, Row):
            raise DataError(f"data.examples: {row}. A row has question, chain_of_thought and answer.")
        examples.append(Example(row.question, f"{answer.up_to_answer(row.chain_of_thought)} {row.answer}"))
    if not examples:
        raise DataError(f"data.examples: {path} holds no example. Add one, or leave data.examples out.")
    return tuple(examples)
