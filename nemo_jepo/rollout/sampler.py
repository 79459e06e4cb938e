"""Prompt -> Rollout: what a sampler is asked and what it must answer."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from nemo_jepo.config.errors import RunError
from nemo_jepo.types import Prompt, Rollout


class SamplersLost(RuntimeError):
    """No server is left to sample from: the run saves and ends, and can be started again."""


class SamplerMismatch(RunError):
    """A sampler does not hold the trainer's weights: training on its samples would be wrong, so the run stops."""


class SamplingStopped(RuntimeError):
    """The run was told to stop while it sampled for a validation."""


def never() -> bool:
    """Sampling goes on to its end."""
    return False


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """How many completions of each prompt, how long, from which distribution and which random numbers."""

    num_generations_per_prompt: int
    """G."""
    max_tokens: int
    """Longest completion."""
    stop_at_marker: bool
    """True: end a completion right after the answer marker. False: decode the own answer too."""
    temperature: float
    """Logits are divided by it; 1 samples the policy itself, 0 takes the likeliest token."""
    seed: int
    """Together with the prompt's id and occurrence and the sample it fixes a completion of the embedded sampler; vLLM
    servers are sent none, so theirs are not repeatable."""
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.num_generations_per_prompt < 1 or self.max_tokens < 1 or self.seed < 0:
            raise ValueError(f"needs at least 1 generation, 1 token and a seed >= 0, got {self}")
        if self.temperature < 0:
            raise ValueError(f"needs a temperature >= 0, got {self}")

    @property
    def untempered(self) -> bool:
        """Draws from the model's own distribution."""
        return self.temperature == 1 and self.top_p == 1 and self.top_k == 0


class Sampler(Protocol):
    """Anything that completes prompts with the weights it was last given."""

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], policy_version: int) -> bool:
        """Takes the weights of one optimizer step.

        Args:
            named_tensors: every parameter once, by Hugging Face name; a tied output head is left out. Read to its end
                even where this sampler fails, because making it is collective.
            policy_version: optimizer steps in these weights; every later Rollout carries it.
        Returns:
            Whether the same weights are wanted once more: a server was lost while others received with it.
        Raises:
            ValueError: a parameter is missing, unknown, sent twice or of another shape.
        """
        ...

    def submit(
        self, prompts: Sequence[Prompt], request: GenerationRequest, stop: Callable[[], bool] = never
    ) -> "Future[list[Rollout]]":
        """Begins to complete every prompt G times.

        Args:
            stop: asked between batches of samples by a sampler that draws before this returns; True ends the drawing,
                and the future raises SamplingStopped.
        Returns:
            A future of len(prompts) * G rollouts ordered by (group, sample); group indexes `prompts`.
            A rollout depends on its prompt, the request and the weights, never on the prompts beside it.
            It raises SamplersLost when no server is left.
        """
        ...

    def probe(self, prompts: Sequence[Prompt], request: GenerationRequest) -> dict[str, list[Rollout]]:
        """The same completions by every server whose weights this sampler is responsible for, by the server's name."""
        ...

    def counts(self) -> dict[str, float]:
        """What went wrong since the beginning, by name, for the metrics."""
        ...

    def close(self) -> None:
        """Ends what the sampler started: requests, connections, servers of its own."""
        ...
