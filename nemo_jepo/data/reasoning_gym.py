"""Questions that the package reasoning-gym generates, with its own answers: `data=reasoning_gym data.task=chain_sum`.

    item 0, 1, 2, ...   one endless sequence of a seed; a question that occurred before is passed over
    validation          the first num_validation_prompts different questions
    train               the next num_train_prompts: none is in both, and validation does not depend on their number

A task is refused where it has no reference answer, or where its questions have several true answers and the reference
is one of them: the likelihood of one is no measure of the others (`MANY_ANSWERS`).

Source: reasoning-gym 0.1.25 (Apache-2.0), arXiv 2505.24760.
"""

import base64
import difflib
import json
import logging
import pickle
import random
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, Literal

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import DataConfig
from nemo_jepo.data.files import Row
from nemo_jepo.data.worked import worked_chain

log = logging.getLogger(__name__)

MANY_ANSWERS = (
    "codeio countdown cryptarithm jugs kakurasu knight_swap n_queens palindrome_generation puzzle24 quantum_lock "
    "shortest_path sokoban tower_of_hanoi word_ladder"
).split()
"""Tasks of 0.1.25 whose scorers follow an answer instead of comparing it with the reference, or (codeio: an input that
gives this output) do not although they should. The package does not mark them: this list is from reading them."""

BLOCK = 256
"""Items that one of the package's data sets generates: some prepare all of theirs when they are made."""
PATIENCE = 2000
"""So many items in a row without a new question: the task has no more."""
SECONDS_BETWEEN_REPORTS = 20.0


def reasoning_gym_rows(config: DataConfig, split: Literal["train", "validation", "warmup"]) -> list[Row]:
    """The rows of one split, the same for the same data.seed; a warm-up has those of train.

    Raises:
        ConfigError: the task is unknown, refused or not made with such arguments, or it has too few questions.
    """
    sequence = _questions(str(config.task), json.dumps(config.task_args, sort_keys=True), config.seed)
    num_validation, wanted = config.num_validation_prompts, config.num_validation_prompts + config.num_train_prompts
    asked = num_validation if split == "validation" else wanted
    rows = sequence.first(asked)
    if len(rows) < asked and len(rows) < 2 * num_validation:
        rule = f"data.task={config.task} has {len(rows)} different questions here, and training needs half of them"
        fix = "Lower it, or widen data.task_args"
        raise ConfigError("data.num_validation_prompts", num_validation, rule, fix)
    if len(rows) < wanted and split != "validation":
        told = "data.task=%s has %d different questions with these data.task_args: %d to train on, %d to validate on"
        log.warning(told, config.task, len(rows), len(rows) - num_validation, num_validation)
    return rows[:num_validation] if split == "validation" else rows[num_validation:]


class Questions:
    """The different questions of a task, drawn as far as somebody asked.

    Args:
        task, arguments: of the package.
        seed: of the run's data.
    Raises:
        ConfigError: see `reasoning_gym_rows`.
    """

    def __init__(self, task: str, arguments: Mapping[str, Any], seed: int) -> None:
        self._task, self._arguments = task, arguments
        # Items i and i + 1 have the generator's seeds s + i and s + i + 1: far apart, seeds of runs share none.
        self._seed = random.Random(f"reasoning_gym {seed}").randrange(2**31 - 2**24)
        self._rows: dict[str, Row] = {}
        self._drawn = self._new_rows()
        self._check_reference()

    def first(self, number: int) -> list[Row]:
        """The first so many, or all there are."""
        began = reported = time.monotonic()
        while len(self._rows) < number and (row := next(self._drawn, None)) is not None:
            self._rows[row.question] = row
            if time.monotonic() - reported > SECONDS_BETWEEN_REPORTS:
                reported = time.monotonic()
                said = "data.task=%s: %d of %d questions generated in %.0f s"
                log.warning(said, self._task, len(self._rows), number, reported - began)
        return list(self._rows.values())[:number]

    def _new_rows(self) -> Iterator[Row]:
        repeated = 0
        for entry in self._entries():
            if entry["question"] in self._rows:
                repeated += 1
                if repeated == PATIENCE:
                    return
                continue
            repeated = 0
            yield Row(
                source=f"reasoning_gym {self._task}",
                line=len(self._rows) + 1,
                question=entry["question"],
                answer=str(entry["answer"]).strip(),
                chain_of_thought=worked_chain(self._task, entry["metadata"]),
                task_entry=base64.b64encode(pickle.dumps(entry)).decode(),
            )

    def _entries(self) -> Iterator[dict[str, Any]]:
        """The package's items, endlessly."""
        block = 0
        while True:
            generated = _dataset(self._task, self._arguments, self._seed + block * BLOCK, BLOCK)
            yield from (generated[index] for index in range(BLOCK))
            block += 1

    def _check_reference(self) -> None:
        """Refuse a task without one reference answer."""
        if self._task in MANY_ANSWERS:
            rule = "its questions have several true answers, of which the reference is one"
        else:
            generated = _dataset(self._task, self._arguments, self._seed, 1)
            entry = generated[0]
            answer = entry["answer"]
            if isinstance(answer, str) and answer.strip() and generated.score_answer(answer, entry) >= 1:
                return
            rule = "it has no reference answer that its own scorer accepts"
        raise ConfigError("data.task", self._task, rule, "Choose a task whose questions have one answer")


@lru_cache(maxsize=2)
def _questions(task: str, arguments: str, seed: int) -> Questions:
    """One sequence for all splits of a run."""
    return Questions(task, json.loads(arguments), seed)


def _dataset(task: str, arguments: Mapping[str, Any], seed: int, size: int) -> Any:
    """One of the package's data sets.

    Raises:
        ConfigError: no such task, or arguments that it does not take.
    """
    import reasoning_gym  # seconds to import; config.check says how to install it
    from reasoning_gym.factory import DATASETS as known

    if task not in known:
        near = difflib.get_close_matches(task, known, n=3, cutoff=0.4)
        rule, fix = f"reasoning-gym has no such task among its {len(known)}", f"Did you mean {', '.join(near)}"
        raise ConfigError("data.task", task, rule, fix if near else "Its names are in the package's GALLERY.md")
    fields = [name for name in known[task][1].__dataclass_fields__ if name not in ("seed", "size")]
    for name in arguments:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.0)
            fix = f"Did you mean {near[0]}; it takes {', '.join(fields)}" if near else "Leave it out"
            raise ConfigError(f"data.task_args.{name}", arguments[name], f"data.task={task} has no such argument", fix)
    try:
        return reasoning_gym.create_dataset(task, seed=seed, size=size, **arguments)
    except (AssertionError, TypeError, ValueError) as error:
        rule = f"data.task={task} refuses them: {error}"
        raise ConfigError("data.task_args", dict(arguments), rule, f"It takes {', '.join(fields)}") from error
