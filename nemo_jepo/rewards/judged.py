"""Second opinions on answers that the rule calls wrong, as figures of an evaluation. No objective reads them.

    r = r_rule + r_judge 1{r_rule = 0}
    combined accuracy = mean(r) = accuracy + asked_rate * correct_rate

    asked_rate     share of samples that are wrong by the rule and hold an answer; without one r = 0, nobody is asked
    correct_rate   share of those, where there is a verdict, that the judge calls correct

An answer without a verdict has no value of r and is in neither part of correct_rate: the mean over the others of its
kind stands for it. To average r over the samples that have one would drop answers that the rule calls wrong and no
others, and an endpoint that is down would make the accuracy 1.

Source: arXiv 2503.19618 (the combined score, r_judge the majority of 5 votes).
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from nemo_jepo.config.judge import RUN_SERVERS, JudgeConfig
from nemo_jepo.metrics import Pair
from nemo_jepo.rewards.judge import Judge
from nemo_jepo.rewards.judge_prompt import Case
from nemo_jepo.rewards.verdict_cache import VerdictCache
from nemo_jepo.setup import Rooms
from nemo_jepo.types import Prompt, Rollout

log = logging.getLogger(__name__)

ACCURACY = {"judge": "combined_accuracy", "model_verifier": "model_verified_accuracy"}
"""Settings node below `evaluation` -> the figure it adds."""


def opinion_figures(
    rooms: Rooms, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], verdicts: Sequence[float | None]
) -> dict[str, Pair]:
    """asked_rate, correct_rate and faults of every second opinion that is configured; all ranks of a replica call.

    Args:
        prompts: [P], indexed by `Rollout.group`.
        rollouts: [N].
        verdicts: [N], the rule's: 1, 0, or None after a fault, about which nobody is asked.
    """
    figures = {}
    for name in ACCURACY:
        if getattr(rooms.config.evaluation, name).url is None:
            continue
        opinions = None if rooms.sampler is None else _ask(rooms, name, _cases(rooms, prompts, rollouts, verdicts))
        opinions = rooms.layout.share_in_replica(opinions)
        known = [opinion for opinion in opinions if opinion is not None]
        num_ruled = sum(verdict is not None for verdict in verdicts)
        figures[f"{name}_asked_rate"] = (float(len(opinions)), float(num_ruled))
        figures[f"{name}_correct_rate"] = (float(sum(known)), float(len(known)))
        figures[f"{name}_faults"] = (float(len(opinions) - len(known)), float(rooms.layout.data_parallel_rank == 0))
    return figures


def combined_accuracies(figures: Mapping[str, float]) -> dict[str, float]:
    """combined_accuracy and its like from merged figures; one for which a part was never measured is left out."""
    combined = {}
    for name, accuracy in ACCURACY.items():
        asked, correct = figures.get(f"{name}_asked_rate"), figures.get(f"{name}_correct_rate")
        if asked == 0:
            combined[accuracy] = figures["accuracy"]
        elif asked is not None and correct is not None:
            combined[accuracy] = figures["accuracy"] + asked * correct
    return combined


def _cases(
    rooms: Rooms, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], verdicts: Sequence[float | None]
) -> list[Case]:
    """The samples that are wrong by the rule and hold an answer."""
    wrong = [rollout for rollout, verdict in zip(rollouts, verdicts, strict=True) if verdict == 0]
    answers = [rooms.splicer.own_answer_text(rollout) for rollout in wrong]
    asked = [prompts[rollout.group] for rollout in wrong]
    return [Case(p.question, p.answer, own) for p, own in zip(asked, answers, strict=True) if own]


def _ask(rooms: Rooms, name: str, cases: Sequence[Case]) -> list[bool | None]:
    """The verdicts of one second opinion; what is missing is one line of the log."""
    settings: JudgeConfig = getattr(rooms.config.evaluation, name)
    try:
        judge = _open(rooms, name, settings)
        opinions, fault = judge.judge(cases), judge.fault
    except (ValueError, OSError) as error:  # the file of its key is gone since the run began
        opinions, fault = [None] * len(cases), str(error)
    num_missing = opinions.count(None)
    if num_missing:
        rest = f"the other {len(cases) - num_missing} stand for them" if num_missing < len(cases) else "it is left out"
        message = "%s: %d of %d answers have no verdict, which counts as neither right nor wrong (%s: %s); %s"
        log.warning(message, name, num_missing, len(cases), ACCURACY[name], rest, fault)
    return opinions


def _open(rooms: Rooms, name: str, settings: JudgeConfig) -> Judge:
    if settings.url == RUN_SERVERS:
        assert rooms.servers is not None, "settings.check asks for rollout=vllm"
        urls, key = rooms.servers
        return Judge(settings, [f"{url}/v1" for url in urls], key, cache=None)
    cache = Path(rooms.config.exp_manager.exp_dir) / settings.cache if settings.cache else None
    key_or_none = settings.key(f"evaluation.{name}")
    return Judge(settings, [str(settings.url)], key_or_none, VerdictCache(cache) if cache else None)
