"""What one step has to do: how many sequences, how long. Lengths are in tokens.

Generations differ in length, and a step waits for the longest. Their model: a few never stop by themselves, a share e;
the others are exponential; all are cut at M = rollout.max_tokens. The mean length fixes r:

    P(length > t) = e + (1 - e) exp(-r t) for t < M, 0 from M on      mean = e M + (1 - e) (1 - exp(-r M)) / r

A group has n samples of one prompt of m tokens, each with a chain of c and the answer of a tokens. Its m - 1 shared
tokens are computed k times, o = 1 + c + a are each sample's own (`nemo_jepo.data.packing`):

    tokens computed         k (m - 1) + n o                               n (m + c + a) where k = n
    query-key pairs         k (m - 1)^2 / 2 + n (o (m - 1) + o^2 / 2)     a sample's queries see the prompt's keys
    k, row of T tokens      n / (samples that fit beside the prompt), rounded up; n where prompts are not shared
"""

import math
from dataclasses import dataclass
from functools import cached_property

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import Config
from nemo_jepo.tools.plan.calibration import ENDLESS_SHARE

PACKING_FILL = 0.94
"""Useful share of rows of fixed length that first-fit decreasing fills, on GSM8K's spread of lengths."""
SHARED_FILL = 0.84
"""The same of groups with a shared prompt, which are larger pieces: `pack` on draws of `Generations`, 16 prompts of 4
samples, means 512 + 512 + 512, prompts and answers of 1 to 1,023 tokens, rows of 4,096 (0.82 and 0.88: of 8,192 and
16,384). It packs whole sequences to 0.96."""
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

    def computed(self, row_tokens: int | None) -> "Computed":
        """What the layers have to compute.

        Args:
            row_tokens: T, the longest row, where prompts are shared; None where each sample has its own.
        """
        shared = max(0.0, self.prompt - 1)
        fixed, mean = self.prompt - shared + self.answer, self.generations.mean
        own, own_square = fixed + mean, fixed**2 + 2 * fixed * mean + self.generations.mean_square
        copies = self.num_generations
        if row_tokens is not None:
            copies = math.ceil(copies / max(1, math.floor((row_tokens - shared) / own)))
        tokens = copies * shared + self.num_generations * own
        pairs = copies * shared**2 / 2 + self.num_generations * (own * shared + own_square / 2)
        scored = self.num_generations * (mean + self.answer)
        return Computed(self.num_prompts * tokens, 2 * pairs / tokens, scored / tokens)


@dataclass(frozen=True, slots=True)
class Computed:
    """One step's sequences as the layers see them."""

    tokens: float
    context: float
    """Twice the keys that a query sees, mean over tokens: of whole sequences E[length^2] / E[length]."""
    scored_share: float
    """Share of the tokens that the output matrix sees: generation and answer."""


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
