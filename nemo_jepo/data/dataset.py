"""A split of a data set, ready to sample from: the one place that knows every data set by name."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nemo_jepo.config.errors import ConfigError, DataError
from nemo_jepo.config.schema import DataConfig
from nemo_jepo.data.arithmetic import arithmetic_rows
from nemo_jepo.data.files import BadRow, Keys, Row, read_rows
from nemo_jepo.data.gsm8k import split_solution
from nemo_jepo.data.prompts import prompts_of_rows
from nemo_jepo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "validation", "warmup"]


@dataclass(frozen=True, slots=True)
class Dataset:
    """One split in memory."""

    prompts: tuple[Prompt, ...]
    bad_rows: tuple[BadRow, ...] = ()
    """Rows left out, only with data.on_bad_row=skip."""


def load_prompts(config: DataConfig, split: Split, tokenizer: "PreTrainedTokenizerBase") -> Dataset:
    """Every usable row of the split; validation stops after data.num_validation_prompts of them.

    train and warmup read data.train_path. For arithmetic, warmup is the corpus with noisy chains of thought.

    Raises:
        ConfigError: the split needs a path that is not set.
        DataError: a bad row with data.on_bad_row=error (file, line, field), or no usable row at all.
    """
    limit = config.num_validation_prompts if split == "validation" else None
    prompts: list[Prompt] = []
    bad_rows: list[BadRow] = []
    for item in prompts_of_rows(_rows(config, split), config, tokenizer):
        if isinstance(item, Prompt):
            prompts.append(item)
        elif config.on_bad_row == "skip":
            bad_rows.append(item)
        else:
            raise DataError(f"{item}. Mend the row, or leave such rows out with data.on_bad_row=skip.")
        if len(prompts) == limit:
            break
    if not prompts:
        first = f"; the first of {len(bad_rows)} bad rows is {bad_rows[0]}" if bad_rows else ""
        raise DataError(f"data={config.name}, {split}: no usable row{first}. Give a file with usable rows.")
    return Dataset(tuple(prompts), tuple(bad_rows))


def training_texts(config: DataConfig) -> Iterator[str]:
    """Everything that the training split reads as, for training a tokeniser: prompts, chains of thought, answers."""
    for row in _rows(config, "warmup"):
        if isinstance(row, Row):
            yield "\n".join(text for text in (row.question, row.chain_of_thought, row.answer) if text)


def _rows(config: DataConfig, split: Split) -> Iterable[Row | BadRow]:
    if config.name == "arithmetic":
        return arithmetic_rows(config.arithmetic, split, config.seed)
    key, path = (
        ("validation_path", config.validation_path) if split == "validation" else ("train_path", config.train_path)
    )
    if path is None:
        raise ConfigError(f"data.{key}", None, f"{split} reads a file", f"Add data.{key}=FILE")
    if config.name == "gsm8k":
        rows = read_rows(Path(path), Keys("question", "answer"))
        return (split_solution(row) if isinstance(row, Row) else row for row in rows)
    return read_rows(Path(path), Keys(config.prompt_key, config.answer_key, config.chain_of_thought_key))
