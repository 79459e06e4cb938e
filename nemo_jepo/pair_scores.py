"""dpo.unverifiable=score: what own answers earn where no verifier rewards a sample of the prompt, by a judge's score.

    r = r_verifier      where data.verifier rewards one of the prompt's samples (or, with objective.reward=hybrid, a
                        model behind it)
        score / 10      elsewhere
        0               elsewhere, of a sample without an own answer; nobody is asked

So a right answer is worth as much as the best score. The judge sees question, reference answer and own answer, never
the chain of thought, in which a policy has room to talk to it. No score is a fault: the sample is in no pair.

Source: arXiv 2506.21495 (pairs of the highest and the lowest score where nothing can be verified).
"""

from collections.abc import Sequence
from pathlib import Path

from nemo_jepo.actor.parallel import Layout
from nemo_jepo.config.judge import ScoreJudgeConfig
from nemo_jepo.data.splice import Splicer
from nemo_jepo.grading import Reward, Sums
from nemo_jepo.rewards.judge import RunServers, scoring_model
from nemo_jepo.rewards.judge_prompt import Case
from nemo_jepo.rewards.judgement import LARGEST_SCORE
from nemo_jepo.types import Pair, Prompt, Rollout
from nemo_jepo.utils.phases import ALONE, phase


class ScoreReward:
    """The reward of pairs whose judge is asked.

    Args:
        settings: of the judge.
        verifiable: what is asked first.
        splicer: finds own answers.
        layout: the replica's first rank asks.
        folder: what the model's `cache` is relative to.
        run_servers: addresses and key of the run's own vLLM servers, for a model that shares them.
    """

    def __init__(
        self,
        settings: ScoreJudgeConfig,
        verifiable: Reward,
        splicer: Splicer,
        layout: Layout,
        folder: Path,
        run_servers: RunServers,
    ) -> None:
        self._verifiable, self._splicer, self._layout, self._sums = verifiable, splicer, layout, Sums()
        self._judge = scoring_model(settings, "dpo.judge", run_servers, folder)

    def of(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], step: int) -> list[float | None]:
        """The reward of each sample, None after a fault; the same on every rank of the replica. All ranks call."""
        verifiable = self._verifiable.of(prompts, rollouts, step)
        with phase(ALONE):
            mine = self._scored(prompts, rollouts, verifiable) if self._layout.is_replica_head else None
            rewards, scores = self._layout.share_in_replica(mine)
        known = [score for score in scores if score is not None]
        num_arrived = sum(rollout.finish_reason != "failed" for rollout in rollouts)
        self._sums.add("score_asked_rate", len(scores), num_arrived)
        self._sums.add("score_fault_rate", len(scores) - len(known), len(scores))
        self._sums.add("score_mean", sum(known), len(known))
        return rewards

    def metrics(self) -> dict[str, Pair]:
        """Those of the verifier, and what the judge was asked and said in the step at hand."""
        return self._verifiable.metrics() | self._sums.take()

    def _scored(
        self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], verifiable: Sequence[float | None]
    ) -> tuple[list[float | None], list[float | None]]:
        """The rewards of the samples, and the judge's scores of those that it was asked about."""
        rewards, asked = list(verifiable), dict[int, Case]()
        rewarded = {rollout.group for rollout, reward in zip(rollouts, verifiable, strict=True) if reward}
        for number, rollout in enumerate(rollouts):
            if rollout.group in rewarded or rollout.finish_reason == "failed":
                continue
            rewards[number] = 0.0
            if own := self._splicer.own_answer_text(rollout):
                prompt = prompts[rollout.group]
                asked[number] = Case(prompt.question, prompt.answer, own)
        scores = self._judge.ask(list(asked.values()))
        for number, score in zip(asked, scores, strict=True):
            rewards[number] = None if score is None else score / LARGEST_SCORE
        return rewards, scores
