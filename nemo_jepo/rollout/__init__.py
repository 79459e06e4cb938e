"""Prompt -> Rollout: what a sampler is asked and what it must answer. The samplers are modules of this room."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from nemo_jepo.types import Prompt, Rollout


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """How many completions of each prompt, how long, and from which random numbers."""

    num_generations_per_prompt: int
    """G."""
    max_tokens: int
    """Longest completion."""
    stop_at_marker: bool
    """True: end a completion right after the answer marker. False: decode the own answer too."""
    temperature: float
    """Logits are divided by it; 1 samples the policy itself."""
    seed: int
    """Together with prompt_id and sample it fixes a completion. Change it every step, and between data sets."""

    def __post_init__(self) -> None:
        if self.num_generations_per_prompt < 1 or self.max_tokens < 1 or self.seed < 0:
            raise ValueError(f"needs at least 1 generation, 1 token and a seed >= 0, got {self}")


class Sampler(Protocol):
    """Anything that completes prompts with the weights it was last given."""

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Takes the weights of one optimizer step.

        Args:
            named_tensors: every parameter once, by Hugging Face name; a tied output head is left out.
            policy_version: optimizer steps in these weights; every later Rollout carries it.
        Raises:
            ValueError: a parameter is missing, unknown, sent twice or of another shape.
        """
        ...

    def generate(self, prompts: Sequence[Prompt], request: GenerationRequest) -> list[Rollout]:
        """Completes every prompt G times.

        Returns:
            len(prompts) * G rollouts ordered by (group, sample); group indexes `prompts`.
            A rollout depends on its prompt, the request and the weights, never on the prompts beside it.
        """
        ...
