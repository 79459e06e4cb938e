"""What one step has to do: how many sequences, how long. Lengths are in tokens.

Generations differ in length, and a step waits for the longest. Their model: a few never stop by themselves, a share e;
the others are exponential; all are cut at M = rollout.max_tokens. The mean length fixes r:

    P(length > t) = e + (1 - e) exp(-r t) for t < M, 0 from M on      mean = e M + (1 - e) (1 - exp(-r M)) / r
"""

import math
from dataclasses import dataclass
from functools import cached_property

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import Config
from nemo_jepo.tools.plan.calibration import ENDLESS_SHARE

PACKING_FILL = 0.94
"""Useful share of a packed row: docs/results/performance.md, "One update, packed against padded"."""
GUESSED_SHARE = 0.5
"""Of the longest prompt, generation and answer, the mean that is assumed where none is given."""


@dataclass(frozen=True)
class Generations:
    """Lengths of generations with this mean, cut at the longest."""

    mean: float
    longest: int

    @property
    def endless(self) -> float:
        """e; less where so short a mean leaves no room for it."""
        return min(ENDLESS_SHARE, 0.1 * self.mean / self.longest)

    @cached_property
    def _decay(self) -> float:
        """x = r M, by bisection on (1 - exp(-x)) / x; 0 where all are the longest."""
        wanted = (self.mean / self.longest - self.endless) / (1 - self.endless)
        if self.mean >= self.longest:
            return 0.0
        low, high = 0.0, 1 / wanted  # (1 - exp(-x)) / x < 1 / x
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if -math.expm1(-middle) / middle > wanted else (low, middle)
        return low

    def longer_than(self, token: float) -> float:
        """Share of generations that go on after so many tokens."""
        if token >= self.longest:
            return 0.0
        return self.endless + (1 - self.endless) * math.exp(-self._decay * token / self.longest)

    @property
    def mean_square(self) -> float:
        """Mean of length^2: 2 integral of t P(length > t) = M^2 (e + (1 - e) 2/x^2 (1 - (1 + x) exp(-x)))."""
        x = self._decay
        ending = 2 / x**2 * (1 - (1 + x) * math.exp(-x)) if x > 1e-3 else 1.0
        return float(self.longest) ** 2 * (self.endless + (1 - self.endless) * ending)


@dataclass(frozen=True, slots=True)
class Workload:
    """One step of the loop."""

    num_prompts: int
    num_generations: int
    """Of each prompt."""
    prompt: float
    """Mean tokens of a prompt."""
    generations: Generations
    answer: float
    """Mean tokens of the reference answer that is appended."""
    longest_sequence: int
    num_updates: int = 1
    """Optimizer steps that share the sequences; ours is 1."""
    packing_fill: float = PACKING_FILL

    @property
    def num_sequences(self) -> int:
        """Sequences of one step."""
        return self.num_prompts * self.num_generations

    @property
    def trained_tokens(self) -> float:
        """Tokens of all sequences of one step, as they are trained on."""
        return self.num_sequences * (self.prompt + self.generations.mean + self.answer)

    @property
    def generated_tokens(self) -> float:
        """Tokens that one step samples."""
        return self.num_sequences * self.generations.mean

    @property
    def scored_share(self) -> float:
        """Share of the tokens that the output matrix sees: generation and answer."""
        scored = self.generations.mean + self.answer
        return scored / (self.prompt + scored)

    @property
    def context(self) -> float:
        """Length of the sequence that a token stands in, mean over tokens: E[length^2] / E[length]."""
        fixed, mean = self.prompt + self.answer, self.generations.mean
        return (fixed**2 + 2 * fixed * mean + self.generations.mean_square) / (fixed + mean)


@dataclass(frozen=True, slots=True)
class MeanLengths:
    """Mean tokens where the user knows them; None for half of the longest."""

    prompt: float | None = None
    generated: float | None = None
    answer: float | None = None


def workload_of(config: Config, means: MeanLengths) -> Workload:
    """One step of a run.

    Raises:
        ConfigError: a mean that is not positive, or above the longest that the settings allow.
    """
    data, longest = config.data, config.rollout.max_tokens
    return Workload(
        num_prompts=config.trainer.jepo.num_prompts_per_step,
        num_generations=config.trainer.jepo.num_generations_per_prompt,
        prompt=_mean("--prompt-tokens", means.prompt, data.max_prompt_tokens, "data.max_prompt_tokens"),
        generations=Generations(_mean("--generated-tokens", means.generated, longest, "rollout.max_tokens"), longest),
        answer=_mean("--answer-tokens", means.answer, data.max_answer_tokens, "data.max_answer_tokens"),
        longest_sequence=data.max_prompt_tokens + longest + data.max_answer_tokens,
    )


def _mean(option: str, given: float | None, longest: int, key: str) -> float:
    mean = longest * GUESSED_SHARE if given is None else given
    if not 0 < mean <= longest:
        raise ConfigError(option, given, f"must be positive and at most {key}={longest}", "Change one of the two")
    return mean
