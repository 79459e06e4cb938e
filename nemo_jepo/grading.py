"""Rewards of own answers: what a verifier says of each sample, on every rank of a replica."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from nemo_jepo.actor.parallel import Layout
from nemo_jepo.data.splice import Splicer
from nemo_jepo.rewards.judgement import pair_rewards
from nemo_jepo.types import Pair, Prompt, Rollout


class Grader(Protocol):
    """A verifier, a task's scorer, or in an evaluation an oracle."""

    def is_right(self, own: str, prompt: Prompt) -> bool | None:
        """Whether an own answer is right; None after a fault."""


class Reward(Protocol):
    """What own answers earn."""

    def of(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], step: int) -> list[float | None]:
        """The reward of each sample, None after a fault; the same on every rank of the replica. All ranks call."""

    def metrics(self) -> dict[str, Pair]:
        """What the step at hand adds to the metrics of every reward; the next step begins anew."""


class Sums:
    """Metrics of a step, added up batch by batch."""

    def __init__(self) -> None:
        self._pairs: dict[str, Pair] = defaultdict(lambda: (0.0, 0.0))

    def add(self, name: str, total: float, count: float) -> None:
        """Add a batch's sum and count."""
        before = self._pairs[name]
        self._pairs[name] = before[0] + total, before[1] + count

    def take(self) -> dict[str, Pair]:
        """All of them; the next step begins anew."""
        found = dict(self._pairs)
        self._pairs.clear()
        return found


class VerifierFooled(Exception):
    """Answers that answer nothing earn a reward: what is trained on it would learn to write them."""


def grade(
    verifier: Grader,
    splicer: Splicer,
    layout: Layout,
    prompts: Sequence[Prompt],
    rollouts: Sequence[Rollout],
) -> list[float | None]:
    """1 where the own answer equals the reference answer, 0 where not or where there is none, None after a fault.

    The replica's first rank asks the verifier; every rank of the replica must call.
    """
    if not layout.is_replica_head:
        return layout.share_in_replica(None)
    verdicts: list[float | None] = []
    for rollout in rollouts:
        if rollout.finish_reason == "failed":
            verdicts.append(None)
            continue
        own = splicer.own_answer_text(rollout)
        verdict = False if own is None else verifier.is_right(own, prompts[rollout.group])
        verdicts.append(None if verdict is None else float(verdict))
    return layout.share_in_replica(verdicts)


@dataclass(frozen=True, slots=True)
class RuleReward:
    """objective.reward=rule: the verdict of data.verifier."""

    verifier: Grader
    splicer: Splicer
    layout: Layout

    def of(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], step: int) -> list[float | None]:
        """The reward of each sample; see `grade`."""
        return grade(self.verifier, self.splicer, self.layout, prompts, rollouts)

    def metrics(self) -> dict[str, Pair]:
        """What the step at hand adds to the metrics of every reward."""
        return {}


@dataclass(frozen=True, slots=True)
class JudgementReward:
    """data.verifier=judgement: what the two judgements of a pair are worth together (`nemo_jepo.rewards.judgement`)."""

    splicer: Splicer

    def of(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], step: int) -> list[float | None]:
        """The reward of each sample; None where a judgement cannot be read."""
        arrived = [rollout for rollout in rollouts if rollout.finish_reason != "failed"]
        answers = {(one.group, one.sample): self.splicer.own_answer_text(one) for one in arrived}
        rewards = pair_rewards(prompts, answers)
        return [rewards.get((rollout.group, rollout.sample)) for rollout in rollouts]

    def metrics(self) -> dict[str, Pair]:
        """None."""
        return {}
