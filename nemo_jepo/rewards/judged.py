"""A judge's verdicts on answers that the verifier calls wrong, as metrics of an evaluation. No objective reads them.

    r = r_verifier + r_judge 1{r_verifier = 0}
    combined accuracy = mean(r) = accuracy + asked_rate * answered_rate * correct_rate

    asked_rate      share of samples that are wrong by the verifier and hold an answer; without one r = 0, none is asked
    answered_rate   share of those about which the judge says anything
    correct_rate    share of these that it calls correct

An answer without a verdict has r_judge = 0: a text that makes the judge fail is as good as a wrong one. Where no answer
has a verdict (the endpoint is down) there is no combined accuracy.

Source: arXiv 2503.19618 (the combined score, r_judge the majority of 5 votes).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_jepo.config.judge import JudgeConfig
from nemo_jepo.config.schema import EvaluationConfig
from nemo_jepo.rewards.judge_prompt import Case
from nemo_jepo.rewards.verdict_cache import open_cache
from nemo_jepo.types import Pair, Prompt, Rollout

if TYPE_CHECKING:
    from nemo_jepo.rewards.judge import Judge

log = logging.getLogger(__name__)

ACCURACY = {"judge": "combined_accuracy", "model_verifier": "model_verified_accuracy"}
"""Settings node below `evaluation` -> the metric it adds."""


def cases_to_judge(
    prompts: Sequence[Prompt],
    rollouts: Sequence[Rollout],
    answers: Sequence[str | None],
    verdicts: Sequence[float | None],
) -> list[Case]:
    """The samples that are wrong by the verifier and hold an answer.

    Args:
        prompts: [P], indexed by `Rollout.group`.
        rollouts: [N].
        answers: [N], each sample's own.
        verdicts: [N], the verifier's: 1, 0, or None after a fault, about which nobody is asked.
    """
    cases = []
    for rollout, answer, verdict in zip(rollouts, answers, verdicts, strict=True):
        if verdict == 0 and answer:
            prompt = prompts[rollout.group]
            cases.append(Case(prompt.question, prompt.answer, answer))
    return cases


@dataclass(frozen=True, slots=True)
class Judges:
    """The judges of a run: none, one, or one and a model verifier."""

    evaluation: EvaluationConfig
    cache_folder: Path
    """What a judge's `cache` is relative to."""
    run_servers: tuple[Sequence[str], str] | None = None
    """Addresses and key of the run's own vLLM servers, for a judge that shares them."""

    @property
    def names(self) -> list[str]:
        """Settings nodes of the judges that have an endpoint."""
        return [name for name in ACCURACY if self.settings(name).url is not None]

    def settings(self, name: str) -> JudgeConfig:
        """Those of one judge."""
        return getattr(self.evaluation, name)

    def ask(self, name: str, cases: Sequence[Case]) -> list[bool | None]:
        """The verdicts of one judge, None where there is none; what is missing is one line of the log."""
        try:
            judge = self._open(name, self.settings(name))
            verdicts, fault = judge.judge(cases), judge.fault
        except (ValueError, OSError) as error:  # the file of its key is gone since the run began
            verdicts, fault = [None] * len(cases), str(error)
        num_missing = verdicts.count(None)
        if num_missing:
            counted = "count as wrong" if num_missing < len(cases) else "leave it out"
            message = "%s: %d of %d answers have no verdict and %s (%s): %s"
            log.warning(message, name, num_missing, len(cases), counted, ACCURACY[name], fault)
        return verdicts

    def _open(self, name: str, settings: JudgeConfig) -> "Judge":
        from nemo_jepo.rewards.judge import open_judge  # HTTP, which a run without a judge does not load

        cache = open_cache(settings, self.cache_folder, "correct", bool)
        return open_judge(settings, f"evaluation.{name}", self.run_servers, cache)


def judge_metrics(
    name: str, judged: Sequence[bool | None], num_samples: int, is_first_replica: bool
) -> dict[str, Pair]:
    """asked_rate, answered_rate, correct_rate and faults of one judge.

    Args:
        judged: its verdicts on this replica's cases.
        num_samples: that arrived, of this replica.
        is_first_replica: faults are summed over replicas, and counted once.
    """
    known = [verdict for verdict in judged if verdict is not None]
    return {
        f"{name}_asked_rate": (float(len(judged)), float(num_samples)),
        f"{name}_answered_rate": (float(len(known)), float(len(judged))),
        f"{name}_correct_rate": (float(sum(known)), float(len(known))),
        f"{name}_faults": (float(len(judged) - len(known)), float(is_first_replica)),
    }


def combined_accuracies(metrics: Mapping[str, float]) -> dict[str, float]:
    """combined_accuracy and its like from merged metrics; one for which a part was never measured is left out."""
    combined = {}
    for name, accuracy in ACCURACY.items():
        asked, correct = metrics.get(f"{name}_asked_rate"), metrics.get(f"{name}_correct_rate")
        if asked == 0:
            combined[accuracy] = metrics["accuracy"]
        elif asked is not None and correct is not None:
            combined[accuracy] = metrics["accuracy"] + asked * metrics[f"{name}_answered_rate"] * correct
    return combined
