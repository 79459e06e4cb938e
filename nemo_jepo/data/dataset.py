"""A split of a data set, ready to sample from: the one place that knows every data set by name."""

import logging
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nemo_jepo.config.errors import ConfigError, DataError
from nemo_jepo.config.schema import AnswerConfig, DataConfig
from nemo_jepo.data.arithmetic import arithmetic_rows
from nemo_jepo.data.files import BadRow, Keys, Row, read_rows
from nemo_jepo.data.gsm8k import split_solution
from nemo_jepo.data.prompts import prompts_of_rows
from nemo_jepo.data.reasoning_gym import reasoning_gym_rows
from nemo_jepo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Split = Literal["train", "validation", "warmup"]


@dataclass(frozen=True, slots=True)
class Dataset:
    """One split in memory."""

    prompts: tuple[Prompt, ...]
    bad_rows: tuple[BadRow, ...] = ()
    """Rows left out, only with data.on_bad_row=skip."""


def load_prompts(
    config: DataConfig, split: Split, tokenizer: "PreTrainedTokenizerBase", answer: AnswerConfig
) -> Dataset:
    """Every usable row of the split; validation stops after data.num_validation_prompts of them.

    train and warmup read data.train_path. For arithmetic, warmup is the corpus with noisy chains of thought.

    Args:
        answer: how solved examples in the prompts write their answers.
    Raises:
        ConfigError: the split needs a path that is not set, or the prompt cannot be written as the settings ask.
        DataError: a bad row with data.on_bad_row=error (file, line, field), or no usable row at all.
    """
    limit = config.num_validation_prompts if split == "validation" else None
    prompts: list[Prompt] = []
    bad_rows: list[BadRow] = []
    for item in prompts_of_rows(_rows(config, split), config, tokenizer, answer):
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


class PromptSplits:
    """The prompts of each split, loaded when first asked for: a warm-up and the run after it read their files once.

    The tokenizer of a run is one and the same from its warm-up to its end, so that prompts are encoded once as well. A
    stage with other rows loads its own, and those of the one before it are gone.

    Args:
        trains: False where only the validation split is read; the others have no prompts then.
    """

    def __init__(self, trains: bool = True) -> None:
        self._unread: dict[str, tuple[Prompt, ...]] = {} if trains else {"train": (), "warmup": ()}
        self._loaded = self._unread.copy()
        self._loaded_for: tuple[DataConfig, AnswerConfig] | None = None

    def get(
        self, config: DataConfig, split: Split, tokenizer: "PreTrainedTokenizerBase", answer: AnswerConfig
    ) -> tuple[Prompt, ...]:
        """The split's prompts; rows that were skipped are listed in the log. Errors: see `load_prompts`."""
        rows = config.without_curriculum(), answer
        if rows != self._loaded_for:
            self._loaded, self._loaded_for = self._unread.copy(), deepcopy(rows)
        source = "train" if split == "warmup" and config.name != "arithmetic" else split
        if source not in self._loaded:
            dataset = load_prompts(config, split, tokenizer, answer)
            for row in dataset.bad_rows[:20]:
                log.warning("skipped: %s", row)
            if dataset.bad_rows:
                log.warning("%s: %d bad rows skipped, %d used", split, len(dataset.bad_rows), len(dataset.prompts))
            self._loaded[source] = dataset.prompts
        return self._loaded[source]


def has_split(config: DataConfig, split: Split) -> bool:
    """Whether the data set has such rows: a validation split needs a file of its own."""
    return split != "validation" or not config.reads_files or config.validation_path is not None


def training_texts(config: DataConfig) -> Iterator[str]:
    """Everything that the training split reads as, for training a tokenizer: prompts, chains of thought, answers."""
    for row in _rows(config, "warmup"):
        if isinstance(row, Row):
            yield "\n".join(text for text in (row.question, row.chain_of_thought, row.answer) if text)


def _rows(config: DataConfig, split: Split) -> Iterable[Row | BadRow]:
    if config.name == "arithmetic":
        generated = arithmetic_rows(config.arithmetic, split, config.seed)
        return generated if config.cluster_key else (replace(row, cluster=None) for row in generated)
    if config.name == "reasoning_gym":
        return reasoning_gym_rows(config, split)
    key, path = (
        ("validation_path", config.validation_path) if split == "validation" else ("train_path", config.train_path)
    )
    if path is None:
        raise ConfigError(f"data.{key}", None, f"{split} reads a file", f"Add data.{key}=FILE")
    if config.name == "gsm8k":
        rows = read_rows(Path(path), Keys("question", "answer"))
        return (split_solution(row) if isinstance(row, Row) else row for row in rows)
    cluster = None if split == "validation" else config.cluster_key
    texts = config.prompt_key, config.answer_key, config.chain_of_thought_key
    return read_rows(Path(path), Keys(*texts, cluster, config.verifiable_key, config.group_key))
