"""The endless order in which a run reads its prompts."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from nemo_jepo.types import Prompt


class PromptStream:
    """Batches of prompts, epoch after epoch, each epoch its own permutation.

    The order of an epoch depends on the seed and the epoch alone, so a position in the stream is one number and a
    resumed run reads exactly what an uninterrupted one would have. A batch may cross into the next epoch.
    """

    def __init__(self, prompts: Sequence[Prompt], num_prompts_per_step: int, shuffle: bool, seed: int) -> None:
        if not prompts or num_prompts_per_step < 1:
            raise ValueError(f"{len(prompts)} prompts, {num_prompts_per_step} per step: both must be at least 1")
        self._prompts = prompts
        self._num_prompts_per_step = num_prompts_per_step
        self._shuffle = shuffle
        self._seed = seed
        self.prompts_seen = 0
        """Prompts handed out since the beginning, over all epochs."""
        self.batches_seen = 0
        """Batches handed out since the beginning: the number of the next one, which names its random numbers."""
        self._order_of = lru_cache(maxsize=4)(self._permutation)

    @property
    def epoch(self) -> int:
        """Complete passes over the data set so far."""
        return self.prompts_seen // len(self._prompts)

    def next_batch(self) -> tuple[Prompt, ...]:
        """The next num_prompts_per_step prompts, which are handed out by this."""
        batch = self.upcoming()
        self.prompts_seen += len(batch)
        self.batches_seen += 1
        return batch

    def upcoming(self, ahead: int = 0) -> tuple[Prompt, ...]:
        """The batch after `ahead` more, which stays in the stream: what is looked at is not lost by an interruption.

        A prompt that it holds again, because it crosses into the next epoch, says so (`Prompt.occurrence`).
        """
        first = self.prompts_seen + ahead * self._num_prompts_per_step
        batch, seen = [], Counter[int]()
        for position in range(first, first + self._num_prompts_per_step):
            prompt = self._at(position)
            again = seen[prompt.prompt_id]
            batch.append(replace(prompt, occurrence=again) if again else prompt)
            seen[prompt.prompt_id] += 1
        return tuple(batch)

    def _at(self, position: int) -> Prompt:
        epoch, index = divmod(position, len(self._prompts))
        return self._prompts[self._order_of(epoch)[index]]

    def _permutation(self, epoch: int) -> list[int]:
        order = list(range(len(self._prompts)))
        if self._shuffle:
            random.Random(f"epoch {epoch} of seed {self._seed}").shuffle(order)
        return order

    def state_dict(self) -> dict[str, int]:
        """The position, with what must be the same for it to mean the same."""
        return {
            "prompts_seen": self.prompts_seen,
            "batches_seen": self.batches_seen,
            "num_prompts": len(self._prompts),
            "seed": self._seed,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
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
