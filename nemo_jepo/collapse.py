"""Chains of thought that stop reasoning, seen in a run's metrics while it trains.

A likelihood objective rewards the chains that make the reference answer likelier. While a model's chains are wrong more
often than they help, the best chain is the shortest one, and within a few updates nothing but the marker is left. The
marker rate, the bound and the loss of such a run look healthy; the length of its chains and their gain do not.

    length    tokens of a valid chain before the marker, mean
    gain      log pi(a*|x, c) - log pi(a*|x), nats: mean of a step where objective.no_chain scores the second, and
              median over held-out prompts at every validation

Steps with few valid chains say little: a mean over eleven of them halves by chance. So the means of a step are taken
over the newest steps that hold MIN_CHAINS valid chains together, and a run's start over its first such steps.

Source: arXiv 2602.03979 (chains of 10 to 34 tokens on proofs).
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

LENGTH = "train_rollouts/reasoning_tokens_mean"
STEP_GAIN = "train_rollouts/chain_gain"
HELD_OUT_GAIN = "val_rollouts/chain_gain_median"
VALID = "train_rollouts/valid_rate"
MIN_CHAINS = 32
REMEDY = (
    "Show solved examples (data.examples), warm up on worked ones (warmup.max_steps, "
    "warmup.sft_target=chain_of_thought), or count a chain that does not help as none (objective=nrt, rlpr); "
    "docs/guides/chains-that-do-not-collapse.md says which helps when"
)


def has_collapsed(length: float, start: float) -> bool:
    """Whether chains of this mean length are no reasoning any more.

        length < 1,  or  length < start / 10,  or  length < start / 2 and length <= start - 10

    The first is the bare marker. Half of the length is asked for beside the 10 tokens, because the mean length of long
    chains moves by more than that from batch to batch.

    Args:
        length: tokens before the marker.
        start: the same at the beginning of the run.
    """
    return length < max(1.0, start / 10) or (length < start / 2 and length <= start - 10)


@dataclass(slots=True)
class RecentMean:
    """Mean of a metric over the valid chains of the newest steps that hold MIN_CHAINS of them together."""

    steps: deque[tuple[float, float]] = field(default_factory=deque)
    """(mean, valid chains) of each, the newest last."""

    def add(self, value: float, num_chains: float) -> float | None:
        """Take a step's mean in. None until there are enough chains."""
        self.steps.append((value, num_chains))
        while sum(number for _, number in self.steps) - self.steps[0][1] >= MIN_CHAINS:
            self.steps.popleft()
        total = sum(number for _, number in self.steps)
        return sum(mean * number for mean, number in self.steps) / total if total >= MIN_CHAINS else None


@dataclass(slots=True)
class ChainWatch:
    """Reads the metrics of a run step by step and says, once each, that its chains collapsed or do not pay.

    A resumed run first lets it read what was logged before, so that the start stays the run's own.
    """

    num_samples: int
    """Samples of one step, valid or not."""
    start: float | None = None
    """Mean length of the run's first MIN_CHAINS valid chains, by whole steps."""
    first_step: int = 0
    collapsed_at: int | None = None
    """The first step whose chains had collapsed."""
    useless_at: int | None = None
    """The first step whose mean gain, or the first validation after a step that sampled chains whose median gain, was
    not above 0."""
    length: RecentMean = field(default_factory=RecentMean)
    gain: RecentMean = field(default_factory=RecentMean)

    def see(self, step: int, metrics: Mapping[str, float | None]) -> list[str]:
        """The warnings that the metrics of this step give for the first time."""
        length, gain, rate = metrics.get(LENGTH), metrics.get(STEP_GAIN), metrics.get(VALID)
        num_chains = self.num_samples * (1.0 if rate is None else rate)
        warnings = []
        if length is not None and num_chains > 0:
            self.first_step = self.first_step or step
            recent = self.length.add(length, num_chains)
            if recent is not None:
                self.start = recent if self.start is None else self.start
                if self.collapsed_at is None and has_collapsed(recent, self.start):
                    self.collapsed_at = step
                    warnings.append(self._collapse(step, recent))
        if self.useless_at is None and self.first_step:
            recent = None if gain is None or num_chains <= 0 else self.gain.add(gain, num_chains)
            held_out = metrics.get(HELD_OUT_GAIN)
            if recent is not None and recent <= 0:
                said = (
                    f"answers are no likelier behind their chains of thought than without (mean chain gain {recent:.2f}"
                )
            elif held_out is not None and held_out <= 0:
                said = (
                    "half of the held-out answers are no likelier behind a chain of thought than without one "
                    f"(median chain gain {held_out:.2f}"
                )
            else:
                return warnings
            self.useless_at = step
            warnings.append(f"step {step}: {said} nats); where that stays so, training shortens chains. {REMEDY}")
        return warnings

    def _collapse(self, step: int, length: float) -> str:
        assert self.start is not None
        if length == self.start:
            return f"step {step}: chains of thought hold {length:.1f} tokens before the marker: no reasoning. {REMEDY}"
        return (
            f"step {step}: chains of thought collapsed, from {self.start:.1f} tokens before the marker at step "
            f"{self.first_step} to {length:.1f}. {REMEDY}"
        )
