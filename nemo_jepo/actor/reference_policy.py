"""The frozen initial policy: a second set of weights that takes the model's place for one scoring pass.

One mechanism, two places to wait: host memory (`model.reference_policy=cpu`) or the GPU (`gpu`, resident).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from nemo_jepo.actor.model import unwrap


class ReferencePolicy:
    """Copies of the weights of a rank's model chunks as they are now."""

    def __init__(self, chunks: Sequence[torch.nn.Module], place: str) -> None:
        """Keep the current weights in host memory (place "cpu") or where they are ("gpu")."""
        self._own = [weight for chunk in chunks for weight in unwrap(chunk).parameters()]
        self._kept = [weight.detach().to("cpu" if place == "cpu" else weight.device, copy=True) for weight in self._own]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the model holds the reference weights; afterwards its own again, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for weight, kept in zip(self._own, self._kept, strict=True):
            own = weight.detach().clone()
            weight.copy_(kept)
            kept.copy_(own)
