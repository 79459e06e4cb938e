"""Chains of thought that stop reasoning, seen in a run's metrics while it trains.

A likelihood objective rewards the chains that make the reference answer likelier. While a model's chains are wrong more
often than they help, the best chain is the shortest one, and within a few updates nothing but the marker is left. The
marker rate, the bound and the loss of such a run look healthy; the length of its chains and their gain do not.

    length    tokens of a valid chain before the marker, mean of a batch
    gain      log pi(a*|x, c) - log pi(a*|x), nats: of held-out prompts, median

Source: arXiv 2602.03979 (chains of 10 to 34 tokens on proofs).
"""

from collections.abc import Mapping
from dataclasses import dataclass

LENGTH = "train_rollouts/reasoning_tokens_mean"
GAIN = "val_rollouts/chain_gain_median"
REMEDY = (
    "Let chains pay first: warm up on worked examples (warmup.max_steps, warmup.sft_target=chain_of_thought); "
    "docs/guides/chains-that-do-not-collapse.md has more"
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
class ChainWatch:
    """Reads the metrics of a run step by step and says, once each, that its chains collapsed or do not pay.

    A resumed run first lets it read what was logged before, so that the start stays the run's own.
    """

    start: float | None = None
    """Length in the first step that had a valid chain."""
    first_step: int = 0
    collapsed_at: int | None = None
    """The first step whose chains had collapsed."""
    useless_at: int | None = None
    """The first validation after a step that sampled chains whose median gain was not above 0."""

    def see(self, step: int, metrics: Mapping[str, float | None]) -> list[str]:
        """The warnings that the metrics of this step give for the first time."""
        warnings = []
        length, gain = metrics.get(LENGTH), metrics.get(GAIN)
        if length is not None:
            if self.start is None:
                self.start, self.first_step = length, step
            if self.collapsed_at is None and has_collapsed(length, self.start):
                self.collapsed_at = step
                warnings.append(self._collapse(step, length))
        if gain is not None and gain <= 0 and self.start is not None and self.useless_at is None:
            self.useless_at = step
            warnings.append(
                f"step {step}: half of the held-out answers are no likelier behind a chain of thought than without "
                f"one (median chain gain {gain:.2f} nats), so training shortens chains. {REMEDY}"
            )
        return warnings

    def _collapse(self, step: int, length: float) -> str:
        assert self.start is not None
        if step == self.first_step:
            return f"step {step}: chains of thought hold {length:.1f} tokens before the marker: no reasoning. {REMEDY}"
        return (
            f"step {step}: chains of thought collapsed, from {self.start:.1f} tokens before the marker at step "
            f"{self.first_step} to {length:.1f}. {REMEDY}"
        )
