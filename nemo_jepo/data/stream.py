"""The endless sequence of batches that a run reads its prompts in, and the order that it has without a curriculum.

Orders that follow what was learnt are in `nemo_jepo.data.curriculum`.
"""

import random
from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from nemo_jepo.types import Prompt


class Shown(NamedTuple):
    """What the samples of one prompt have shown; NaN where none arrived."""

    pass_rate: float
    """How well the policy answers it, from 0 to 1."""
    spread: float
    """How much its samples differ in what they are worth, in the reward's unit."""


class Order(Protocol):
    """Which prompts come, by their places in the data set. What is taken of a shallow copy stays in the original."""

    seed: int
    learns: bool
    """What comes next depends on what was learnt."""

    @property
    def epoch(self) -> int:
        """Complete passes so far."""

    def take(self, count: int) -> list[int]:
        """The prompts of the next batch, which are handed out by this."""

    def learn(self, places: Sequence[int], shown: Sequence[Shown]) -> None:
        """What prompts that were handed out have shown."""

    def metrics(self) -> dict[str, float]:
        """What the order says of itself."""

    def state_dict(self) -> dict[str, Any]:
        """The position, as far as the stream's own does not say it."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a position that the stream saved, maybe with another order."""


class Epochs:
    """Every prompt once an epoch, each epoch its own permutation.

    The order of an epoch depends on the seed and the epoch alone, so a position is one number. A batch may cross into
    the next epoch.
    """

    learns = False

    def __init__(self, num_prompts: int, shuffle: bool, seed: int) -> None:
        self.seed = seed
        self._num_prompts = num_prompts
        self._shuffle = shuffle
        self._seen = 0
        self._order_of = lru_cache(maxsize=4)(self._permutation)

    @property
    def epoch(self) -> int:
        """See Order."""
        return self._seen // self._num_prompts

    def take(self, count: int) -> list[int]:
        """See Order."""
        first, self._seen = self._seen, self._seen + count
        return [self._at(position) for position in range(first, self._seen)]

    def learn(self, places: Sequence[int], shown: Sequence[Shown]) -> None:
        """Changes nothing."""

    def metrics(self) -> dict[str, float]:
        """None."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the stream counts prompts."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Order."""
        self._seen = state["prompts_seen"]

    def _at(self, position: int) -> int:
        epoch, index = divmod(position, self._num_prompts)
        return self._order_of(epoch)[index]

    def _permutation(self, epoch: int) -> list[int]:
        return permuted(range(self._num_prompts), epoch, self._shuffle, self.seed)


class TiedEpochs(Epochs):
    """As Epochs, with groups of prompts in the place of prompts: a group's stand side by side.

    Args:
        groups: places in the data set, every group of the same size.
    """

    def __init__(self, groups: Sequence[Sequence[int]], shuffle: bool, seed: int) -> None:
        super().__init__(len(groups), shuffle, seed)
        self._groups = groups
        self._size = len(groups[0])

    def take(self, count: int) -> list[int]:
        """See Order; count is a multiple of the groups' size."""
        return [place for group in super().take(count // self._size) for place in self._groups[group]]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Order."""
        super().load_state_dict({"prompts_seen": state["prompts_seen"] // self._size})


def groups_of(prompts: Sequence[Prompt]) -> list[list[int]]:
    """The places of each group's prompts, in the order of their first ones; a prompt without a key is a group."""
    groups: dict[object, list[int]] = {}
    for place, prompt in enumerate(prompts):
        groups.setdefault(place if prompt.group_key is None else prompt.group_key, []).append(place)
    return list(groups.values())


def permuted(places: Sequence[int], epoch: int, shuffle: bool, seed: int) -> list[int]:
    """The order of an epoch that holds these."""
    order = list(places)
    if shuffle:
        random.Random(f"epoch {epoch} of seed {seed}").shuffle(order)
    return order


class PromptStream:
    """Batches of prompts, one after another, in an order that may follow what earlier batches have shown.

    The next batch depends on the state alone, so a resumed run reads exactly what an uninterrupted one would have.
    """

    def __init__(self, prompts: Sequence[Prompt], num_prompts_per_step: int, order: Order) -> None:
        if not prompts or num_prompts_per_step < 1:
            raise ValueError(f"{len(prompts)} prompts, {num_prompts_per_step} per step: both must be at least 1")
        self._prompts = prompts
        self._num_prompts_per_step = num_prompts_per_step
        self._order = order
        self._unlearnt: list[int] = []
        """Places in the data set of what was handed out since `learn`."""
        self.prompts_seen = 0
        """Prompts handed out since the beginning, over all epochs."""
        self.batches_seen = 0
        """Batches handed out since the beginning: the number of the next one, which names its random numbers."""

    @property
    def epoch(self) -> int:
        """Complete passes over the data set so far."""
        return self._order.epoch

    def next_batch(self) -> tuple[Prompt, ...]:
        """The next num_prompts_per_step prompts, which are handed out by this."""
        places = self._order.take(self._num_prompts_per_step)
        if self._order.learns:
            self._unlearnt += places
        self.prompts_seen += len(places)
        self.batches_seen += 1
        return self._batch(places)

    def upcoming(self, ahead: int = 0) -> tuple[Prompt, ...]:
        """The batch after `ahead` more, which stays in the stream: what is looked at is not lost by an interruption.

        A prompt that it holds again, because it crosses into the next epoch, says so (`Prompt.occurrence`).
        """
        order = copy(self._order)
        for _ in range(ahead):
            order.take(self._num_prompts_per_step)
        return self._batch(order.take(self._num_prompts_per_step))

    def learn(self, shown: Sequence[Shown]) -> None:
        """What the batches handed out since the last call have shown, in their order: it may change who comes next."""
        self._order.learn(self._unlearnt, shown)
        self._unlearnt = []

    def metrics(self) -> dict[str, float]:
        """What the order says of itself."""
        return self._order.metrics()

    def _batch(self, places: Sequence[int]) -> tuple[Prompt, ...]:
        batch, seen = [], Counter[int]()
        for place in places:
            prompt = self._prompts[place]
            again = seen[prompt.prompt_id]
            batch.append(replace(prompt, occurrence=again) if again else prompt)
            seen[prompt.prompt_id] += 1
        return tuple(batch)

    def state_dict(self) -> dict[str, Any]:
        """The position, with what must be the same for it to mean the same."""
        return {
            "prompts_seen": self.prompts_seen,
            "batches_seen": self.batches_seen,
            "num_prompts": len(self._prompts),
            "seed": self._order.seed,
            **self._order.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position saved by `state_dict`; num_prompts_per_step may differ.

        Raises:
            ValueError: the data set has another size or the seed is another, so the position is another prompt.
        """
        here = self.state_dict()
        for key in ("num_prompts", "seed"):
            if state[key] != here[key]:
                saved = f"saved with {key}={state[key]}, resumed with {here[key]}"
                raise ValueError(f"{saved}. Resume with the data set and the data.seed of the saved run.")
        self.prompts_seen = state["prompts_seen"]
        self.batches_seen = state.get("batches_seen", self.prompts_seen // self._num_prompts_per_step)  # older: a step
        self._order.load_state_dict({**state, "batches_seen": self.batches_seen})
