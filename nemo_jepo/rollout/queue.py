"""Rollouts for every rank of a replica, from the one sampler that the replica's first rank holds.

    take          rollouts of a batch of the stream; those of the next max_staleness batches are asked for as well
    sample        held-out prompts, in batches, which a run that is told to stop does not wait for
    load_weights  the sampler's next weights

On GPUs that servers and trainers share, load_weights begins the servers' turn, and the batch's last rollout ends it.

Everything that changes while a run samples is here: pending rollouts, the version of the sampler's weights, counts.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace

from torch import Tensor

from nemo_jepo.actor.parallel import Layout
from nemo_jepo.rollout.sampler import GenerationRequest, Sampler, SamplersLost, SamplingStopped, never
from nemo_jepo.rollout.shared_gpus import SharedGPUs
from nemo_jepo.types import Prompt, Rollout


class RolloutQueue:
    """What a run samples with. All ranks of the world call every method but `close`.

    Args:
        sampler: of this replica, on its first rank; None on the others, which are told what it drew.
        layout: of this rank.
        request_for: number of a batch -> what is asked for it.
        upcoming: number of batches ahead -> this replica's prompts of that batch.
        max_staleness: steps that a rollout may be behind the weights that train on it.
        num_batches: no batch from this number on is asked for ahead; None: nobody knows how many there will be.
        shared: the GPUs, where trainers and servers take turns on them; then nothing is asked for ahead.
    """

    def __init__(
        self,
        sampler: Sampler | None,
        layout: Layout,
        request_for: Callable[[int], GenerationRequest],
        upcoming: Callable[[int], Sequence[Prompt]],
        max_staleness: int,
        num_batches: int | None,
        shared: SharedGPUs | None = None,
    ) -> None:
        assert shared is None or max_staleness == 0, "servers sleep while the trainers train"
        self._sampler = sampler
        self._layout = layout
        self._request_for = request_for
        self._upcoming = upcoming
        self._max_staleness = max_staleness
        self._num_batches = num_batches
        self._shared = shared
        self._pending: dict[int, Future[list[Rollout]]] = {}  # by the number of their batch
        self.version = -1
        """Optimizer steps in the sampler's weights; -1 where it has none: at first, and when its servers sleep."""
        self.counts: dict[str, float] = {}
        """`Sampler.counts` of this replica when it was last asked for rollouts."""

    def take(self, prompts: Sequence[Prompt], number: int, ahead: int = 0) -> list[Rollout]:
        """The rollouts of one batch.

        Args:
            prompts: this replica's, of that batch.
            number: of the batch, counted over the run.
            ahead: batches between the stream's next one and this.
        Raises:
            SamplersLost: on every rank, where any replica has no server left.
        """
        last = number + self._max_staleness
        if self._num_batches is not None:
            last = min(last, self._num_batches - 1)
        for later in range(number, last + 1):
            if self._sampler is not None and later not in self._pending:
                batch = prompts if later == number else self._upcoming(ahead + later - number)
                self._pending[later] = self._sampler.submit(batch, self._request_for(later))
        return self._collect(self._pending.pop(number, None))

    def sample(
        self,
        prompts: Sequence[Prompt],
        request: GenerationRequest,
        stop: Callable[[], bool] = never,
        num_batches: int = 1,
    ) -> Iterator[list[Rollout]]:
        """Rollouts of these prompts, batch by batch; servers are asked for all of them before the first is read.

        What is collective happens as the iterator is read, so every rank reads it in the same places.

        Args:
            num_batches: the same on every rank.
        Yields:
            Rollouts of a run of the prompts, in their order; `Rollout.group` indexes all of them.
        Raises:
            SamplersLost: on every rank, where any replica has no server left.
            SamplingStopped: on every rank, where `stop` became true on any.
        """
        assert self._shared is None or num_batches == 1, "servers sleep after a batch"
        if self._layout.any_over_world(stop()):
            self._end_turn()
            raise SamplingStopped("told to stop before a batch was sampled")
        bounds = [len(prompts) * number // num_batches for number in range(num_batches + 1)]
        asked: list[tuple[int, Future[list[Rollout]] | None]] = [
            (first, self._sampler.submit(prompts[first:end], request, stop) if self._sampler else None)
            for first, end in itertools.pairwise(bounds)
        ]
        try:
            for first, future in asked:
                rollouts = self._collect(future)
                if self._layout.any_over_world(stop()):
                    raise SamplingStopped("told to stop while a batch was sampled")
                yield [replace(rollout, group=first + rollout.group) for rollout in rollouts]
        finally:
            for _, future in asked:
                if future is not None:
                    future.cancel()  # where it ends early

    def load_weights(self, weights: Callable[[], Iterable[tuple[str, Tensor]]], version: int) -> None:
        """Give the sampler the weights of one optimizer step.

        Args:
            weights: makes (Hugging Face name, tensor), which is collective, so every rank reads to the end; again where
                a sampler asks for it.
            version: optimizer steps in them.
        """
        if self._shared is not None:
            self._shared.to_servers()
        wants = self._sampler is not None
        while self._layout.any_over_world(wants):
            stream = weights()
            if self._sampler is not None and wants:
                wants = self._sampler.load_weights(stream, version)
            else:
                for _ in stream:
                    pass
        self.version = version

    def probe(self, prompts: Sequence[Prompt], request: GenerationRequest) -> dict[str, list[Rollout]]:
        """The same completions by every server that this replica feeds, by the server's name."""
        return self._layout.share_in_replica(self._sampler.probe(prompts, request) if self._sampler else None) or {}

    def close(self) -> None:
        """End requests and connections."""
        for future in self._pending.values():
            future.cancel()
        if self._sampler is not None:
            self._sampler.close()

    def _end_turn(self) -> None:
        """Servers that share the trainers' GPUs sleep, and have no weights from then on."""
        if self._shared is not None:
            self._shared.to_trainers()
            self.version = -1

    def _collect(self, future: "Future[list[Rollout]] | None") -> list[Rollout]:
        """What the replica's first rank waits for, on every rank of the replica."""
        drawn, lost, stopped, counts = None, "", False, {}
        if self._sampler is not None and future is not None:
            try:
                drawn = future.result()
            except SamplersLost as error:
                lost = str(error)
            except SamplingStopped:
                stopped = True
            counts = self._sampler.counts()
        drawn, lost, stopped, self.counts = self._layout.share_in_replica((drawn, lost, stopped, counts))
        self._end_turn()
        if self._layout.any_over_world(bool(lost)):
            raise SamplersLost(lost or "another replica has no server left")
        if self._layout.any_over_world(stopped):
            raise SamplingStopped("told to stop while a batch was sampled")
        return drawn
