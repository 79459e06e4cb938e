"""objective.reward=hybrid: a rule first, then a model for what the rule calls wrong; and canaries that watch the model.

    r = r_rule                where the rule calls the own answer right, or comes to no verdict
        r_model               where the rule calls it wrong and the model is asked about it
        0                     where the rule calls it wrong and nobody is asked

The model is asked where there is an own answer, where it and the reference answer are not both plain numbers, which
the rule compares exactly, and under jepo_rl where the rule can grade the prompt at all: the others train on the
likelihood of their reference answer. It sees question, reference answer and own answer, never the chain of thought. No
verdict is a fault, as one of the rule is: the sample earns neither 0 nor 1.

Source: arXiv 2505.22203 (hybrid verifier and its gate); arXiv 2505.14625 (TinyV's add-on, which sends the own answer
alone).
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from nemo_jepo.config.hybrid import HybridConfig
from nemo_jepo.grading import RuleReward, Sums, VerifierFooled
from nemo_jepo.rewards.canaries import canaries
from nemo_jepo.rewards.judge import RunServers, verifying_model
from nemo_jepo.rewards.judge_prompt import Case
from nemo_jepo.rewards.verifiable import undelimited
from nemo_jepo.types import Pair, Prompt, Rollout
from nemo_jepo.utils.phases import ALONE, phase

PLAIN_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)")


def is_plain_number(text: str) -> bool:
    """Whether a text is one number in digits, with or without dollars and a full stop."""
    return PLAIN_NUMBER.fullmatch(undelimited(text.strip().rstrip(".")).strip()) is not None


class HybridReward:
    """The reward of a run whose model verifier is asked.

    Args:
        settings: the model verifier and its canaries.
        rule: what is asked first.
        only_verifiable: the model is not asked about prompts that the rule cannot grade.
        folder: what the model's `cache` is relative to.
        run_servers: addresses and key of the run's own vLLM servers, for a model that shares them.
    """

    def __init__(
        self,
        settings: HybridConfig,
        rule: RuleReward,
        only_verifiable: bool,
        folder: Path,
        run_servers: RunServers,
    ) -> None:
        self._settings, self._rule, self._only_verifiable = settings, rule, only_verifiable
        self._layout, self._sums = rule.layout, Sums()
        self._model = verifying_model(settings.verifier, "hybrid.verifier", run_servers, folder)
        self._watched_at = -1

    def of(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], step: int) -> list[float | None]:
        """The reward of each sample, None after a fault; the same on every rank of the replica. All ranks call.

        Args:
            step: optimizer steps done.
        Raises:
            VerifierFooled: on every rank, where canaries are due and more than canary_limit of them earn a reward.
        """
        if self._canaries_are_due(step):
            self._watch(prompts, step)
        by_rule = self._rule.of(prompts, rollouts, step)
        with phase(ALONE):
            mine = self._second_look(prompts, rollouts, by_rule) if self._layout.is_replica_head else None
            rewards, verdicts = self._layout.share_in_replica(mine)
        self._count(rollouts, by_rule, rewards, verdicts)
        return rewards

    def metrics(self) -> dict[str, Pair]:
        """The rewards of the step at hand side by side, and what the model did; the next step begins anew."""
        return self._sums.take()

    def _second_look(
        self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], by_rule: Sequence[float | None]
    ) -> tuple[list[float | None], list[bool | None]]:
        """The rewards of the samples, and the model's verdicts on those that it was asked about."""
        answers = [self._rule.splicer.own_answer_text(rollout) for rollout in rollouts]
        return self._rewarded([prompts[rollout.group] for rollout in rollouts], answers, by_rule)

    def _rewarded(
        self, prompts: Sequence[Prompt], answers: Sequence[str | None], by_rule: Sequence[float | None]
    ) -> tuple[list[float | None], list[bool | None]]:
        """The rewards of answers to these prompts, and the model's verdicts on those that it is asked about."""
        samples = enumerate(zip(prompts, answers, by_rule, strict=True))
        asked = {number: case for number, sample in samples if (case := self._case(*sample)) is not None}
        verdicts, rewards = self._model.ask(list(asked.values())), list(by_rule)
        for number, verdict in zip(asked, verdicts, strict=True):
            rewards[number] = None if verdict is None else float(verdict)
        return rewards, verdicts

    def _case(self, prompt: Prompt, answer: str | None, verdict: float | None) -> Case | None:
        """What the model is asked about a sample; None where it is not."""
        if verdict != 0 or not answer or (self._only_verifiable and not prompt.verifiable):
            return None
        if is_plain_number(answer) and is_plain_number(prompt.answer):
            return None
        return Case(prompt.question, prompt.answer, answer)

    def _count(
        self,
        rollouts: Sequence[Rollout],
        by_rule: Sequence[float | None],
        rewards: Sequence[float | None],
        verdicts: Sequence[bool | None],
    ) -> None:
        num_arrived = sum(rollout.finish_reason != "failed" for rollout in rollouts)
        known = [verdict for verdict in verdicts if verdict is not None]
        self._sums.add("rule_reward", *_total(by_rule))
        self._sums.add("hybrid_reward", *_total(rewards))
        self._sums.add("hybrid_asked_rate", len(verdicts), num_arrived)
        self._sums.add("hybrid_correct_rate", sum(known), len(known))
        self._sums.add("hybrid_fault_rate", len(verdicts) - len(known), len(verdicts))

    # Canaries.

    def _canaries_are_due(self, step: int) -> bool:
        """Once in the steps that they are due in, however many batches such a step draws."""
        interval = self._settings.canary_interval
        return interval > 0 and step % interval == 0 and step != self._watched_at

    def _watch(self, prompts: Sequence[Prompt], step: int) -> None:
        """Score every kind of canary on the first prompts that the model may be asked about."""
        self._watched_at = step
        carriers = [prompt for prompt in prompts if prompt.verifiable or not self._only_verifiable]
        released = [
            (prompt, kind, text)
            for prompt in carriers[: self._settings.canary_prompts]
            for kind, text in canaries(prompt.question).items()
        ]
        with phase(ALONE):
            mine = self._canary_rewards(released) if self._layout.is_replica_head else None
            rewards = self._layout.share_in_replica(mine)
        kinds = list(canaries(""))
        table = torch.zeros(len(kinds), 2, dtype=torch.float64)
        for (_, kind, _), reward in zip(released, rewards, strict=True):
            if reward is not None:
                table[kinds.index(kind)] += torch.tensor([reward, 1.0])
        self._sums.add("verifier_canary_rate", *table.sum(0).tolist())
        table = self._layout.sum_over_data_parallel(table)
        fooled, known = table.sum(0).tolist()
        limit = self._settings.canary_limit
        if limit is not None and fooled > limit * known:
            found = zip(kinds, table.tolist(), strict=True)
            named = ", ".join(f"{kind} {one[0]:.0f} of {one[1]:.0f}" for kind, one in found if one[0])
            raise VerifierFooled(
                f"{fooled:.0f} of {known:.0f} answers that answer nothing earn a reward ({named}), more than "
                f"hybrid.canary_limit={limit:g}. Use another model (hybrid.verifier), or objective.reward=rule"
            )

    def _canary_rewards(self, released: Sequence[tuple[Prompt, str, str]]) -> list[float | None]:
        """What the canaries would earn, by the rule and by the model behind it."""
        prompts, texts = [prompt for prompt, _, _ in released], [text for _, _, text in released]
        asked = [self._rule.verifier.is_right(text, prompt) for prompt, text in zip(prompts, texts, strict=True)]
        by_rule = [None if verdict is None else float(verdict) for verdict in asked]
        return self._rewarded(prompts, texts, by_rule)[0]


def _total(rewards: Sequence[float | None]) -> Pair:
    known = [reward for reward in rewards if reward is not None]
    return sum(known), float(len(known))
