"""The frozen initial policy: a second set of weights that takes the model's place for one scoring pass.

One mechanism, two places to wait: host memory (`model.reference_policy=cpu`) or the GPU (`gpu`, resident).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nemo_jepo.actor.model import unwrap


class ReferencePolicy:
    """Copies of a model's weights as they are now."""

    def __init__(self, module: torch.nn.Module, place: str) -> None:
        """Keep the current weights in host memory (place "cpu") or where they are ("gpu")."""
        self._module = module
        self._weights = {
            name: weight.detach().to("cpu" if place == "cpu" else weight.device, copy=True)
            for name, weight in unwrap(module).named_parameters()
        }

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
        for name, weight in unwrap(self._module).named_parameters():
            own = weight.detach().clone()
            weight.copy_(self._weights[name])
            self._weights[name].copy_(own)
