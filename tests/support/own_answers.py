"""Samples whose own answers a test writes down, a rule that grades them, and what a reward counts."""

from dataclasses import dataclass

from nemo_jepo.grading import Reward
from nemo_jepo.types import Prompt, Rollout


@dataclass
class Written:
    """A splicer that knows what each sample answered, by its number."""

    answers: list[str | None]

    def own_answer_text(self, rollout: Rollout) -> str | None:
        return self.answers[rollout.sample]


class Rule:
    """A verifier of equal texts; "slow" is a fault. Like the program's own, it calls wrong what nobody can grade."""

    def is_right(self, own: str, prompt: Prompt) -> bool | None:
        return None if own == "slow" else prompt.verifiable and own == prompt.answer


def rollouts_of(groups: list[int]) -> list[Rollout]:
    """Samples 0, 1, .. that arrived, of these prompts."""
    return [Rollout(group, sample, (1,), (0.0,), "stop") for sample, group in enumerate(groups)]


def means(reward: Reward) -> dict[str, float]:
    """The metrics of the step at hand that something was counted for."""
    return {name: total / count for name, (total, count) in reward.metrics().items() if count}
