"""Older weights of the policy, which take the model's place for a while.

The reference policy scores; the sampler's policy, where training goes on between weight syncs, is pushed and saved.
One mechanism, two places to wait: host memory (`model.reference_policy=cpu`) or the GPU (`gpu`, resident).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from nemo_jepo.actor.model import unwrap


class KeptPolicy:
    """Copies of the weights of a rank's model chunks as they are now."""

    def __init__(self, chunks: Sequence[torch.nn.Module], place: str) -> None:
        """Keep the current weights in host memory (place "cpu") or where they are ("gpu")."""
        self._own = [weight for chunk in chunks for weight in unwrap(chunk).parameters()]
        self._kept = [weight.detach().to("cpu" if place == "cpu" else weight.device, copy=True) for weight in self._own]
        self._over_the_bus = self._own[0].is_cuda and place == "cpu"
        if self._over_the_bus:  # the GPU reads and writes pinned memory by itself, both at once
            self._kept = [kept.pin_memory() for kept in self._kept]

    @torch.no_grad()
    def keep(self) -> None:
        """Take the weights as they are now in the place of the older ones."""
        for weight, kept in zip(self._own, self._kept, strict=True):
            kept.copy_(weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the model holds the kept weights; afterwards its own again, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        if self._over_the_bus:
            self._exchange_over_the_bus()
            return
        for weight, kept in zip(self._own, self._kept, strict=True):
            own = weight.detach().clone()
            weight.copy_(kept)
            kept.copy_(own)

    def _exchange_over_the_bus(self) -> None:
        """Weights go out on a stream of their own while the next ones come in; what follows waits for both."""
        current, outward = torch.cuda.current_stream(), torch.cuda.Stream()
        for weight, kept in zip(self._own, self._kept, strict=True):
            own = weight.detach().clone()
            weight.copy_(kept, non_blocking=True)
            outward.wait_stream(current)
            own.record_stream(outward)
            with torch.cuda.stream(outward):
                kept.copy_(own, non_blocking=True)
        current.wait_stream(outward)
