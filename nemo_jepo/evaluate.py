"""Held-out metrics of a model: samples of held-out prompts, scored by likelihood and by what they answer.

    proxy NLL  = - (logsumexp_i l_i - log n),  l_i = log pi(a*|x, c_i),  c_i ~ pi     (lower is better; n = 4)
    chain gain = l_i - l0,                     l0 = log pi(a*|x), no chain before the marker

`nemo_jepo.held_out` has the arithmetic. Nothing here is a reward. Source: arXiv 2503.19618, Section 4 and Eq. 6.
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from nemo_jepo.actor.heartbeat import heartbeat
from nemo_jepo.actor.parallel import Layout, init_distributed, init_model_parallel, on_first_rank
from nemo_jepo.actor.scoring import assembled, score
from nemo_jepo.checkpoint.format import latest_checkpoint, passed_over
from nemo_jepo.config.parts import folders_in
from nemo_jepo.config.schema import Config
from nemo_jepo.config.warmup import started_from
from nemo_jepo.data.dataset import PromptSplits
from nemo_jepo.data.oracle import ArithmeticOracle
from nemo_jepo.data.stream import groups_of
from nemo_jepo.data.verdict import VerdictWriter
from nemo_jepo.grading import Grader, grade
from nemo_jepo.held_out import (
    Graded,
    accuracies_at_k,
    accuracy,
    judged_pairs,
    likelihoods,
    median_over_prompts,
    proxy_nll,
    verified_at_k,
)
from nemo_jepo.lessons import pass_rate
from nemo_jepo.metrics import chain_gain, mean, merge, rollout_metrics, rollout_records
from nemo_jepo.objective.records import GroupScores, Scored
from nemo_jepo.rewards.judge_prompt import Case
from nemo_jepo.rewards.judged import Judges, cases_to_judge, combined_accuracies, judge_metrics
from nemo_jepo.rewards.task import TaskScorer
from nemo_jepo.rollout.build import OwnServers
from nemo_jepo.rollout.sampler import GenerationRequest, never
from nemo_jepo.setup import Trainer, build, task_scorer
from nemo_jepo.types import Pair, Prompt, Rollout, Scores, SplicedBatch
from nemo_jepo.utils.exit_codes import DONE
from nemo_jepo.utils.files import write_atomically
from nemo_jepo.utils.phases import ALONE, phase
from nemo_jepo.weight_sync import sync_weights

T = TypeVar("T")

VALIDATION_SEED = 0
"""Validation draws from the same random numbers every time, so that steps are compared on equal terms."""


class Evaluated(NamedTuple):
    """What an evaluation finds, the same on every rank."""

    metrics: dict[str, float]
    """docs/guides/evaluate.md says what each is; one that nothing was measured for is left out."""
    records: list[dict[str, Any]]
    """One rollout of each of the first few prompts."""
    pass_rates: list[dict[str, Any]]
    """Of each prompt, where evaluation.pass_rates asks for them."""


def main(config: Config) -> int:
    """The command: metrics of the run's newest checkpoint, else of the model that the config starts from, as JSON."""
    init_distributed()
    init_model_parallel(config.model)
    folder, layout = config.run_folder, Layout()
    newest = on_first_rank(partial(newest_of_run, folder)) if config.exp_manager.resume_if_exists else None
    if newest is not None:
        config = started_from(config, newest)
    without = replace(config.objective, name="jepo", no_chain="none", reward="rule")
    online = replace(config.rollout, sync_interval=1)
    config = replace(config, objective=without, rollout=online, kl=replace(config.kl, beta=0.0))  # no pi_ref: the model
    splits = PromptSplits(trains=False)
    with heartbeat(config.trainer.stuck_timeout_s), OwnServers(folder) as servers:
        with closing(build(config, folder, layout, servers, splits)) as t:
            found = evaluate(t, t.validation)
    if layout.rank == 0:
        source = str(newest or t.config.pretrained_checkpoint.restore_from_path or "random initialisation")
        always = dict.fromkeys(("accuracy", "proxy_nll", "marker_rate", "cot_tokens_mean"))
        if config.evaluation.judge.url is not None:
            always["combined_accuracy"] = None
        print(json.dumps({"model": source, "num_prompts": len(t.validation)} | always | found.metrics), flush=True)
        if config.evaluation.pass_rates is not None:
            lines = [json.dumps(row) + "\n" for row in found.pass_rates]
            write_atomically(Path(config.evaluation.pass_rates), "".join(lines))
    return DONE


def newest_of_run(folder: Path) -> Path | None:
    """The newest checkpoint of a run, or of its last stage, or of its warm-up where those have none yet; newer broken
    ones are named."""
    for checkpoints in (place / "checkpoints" for place in folders_in(folder)):
        for line in passed_over(checkpoints):
            print(line, file=sys.stderr)
        if (newest := latest_checkpoint(checkpoints)) is not None:
            return newest
    return None


def evaluate(t: Trainer, prompts: Sequence[Prompt], stop: Callable[[], bool] = never) -> Evaluated:
    """Metrics over the prompts, and what they were made of; all ranks call.

    Args:
        t: of the run.
        prompts: the same on every rank.
        stop: asked between batches of samples; True on any rank ends the evaluation on all.
    Raises:
        SamplingStopped: on every rank, where the evaluation was ended.
        SamplersLost, SamplerMismatch: see the sampler.
    """
    config, layout = t.config, t.layout
    groups = groups_of(prompts)[layout.data_parallel_rank :: layout.data_parallel_size]
    place = [one for group in groups for one in group]
    mine, size = [prompts[one] for one in place], config.evaluation.num_generations_per_prompt

    # The same samples serve every metric; own answers are decoded where somebody reads them
    sync_weights(t)
    answered = reads_own_answers(config, prompts)
    request = GenerationRequest(
        num_generations_per_prompt=size,
        max_tokens=config.evaluation.max_tokens or config.rollout.max_tokens,
        stop_at_marker=not answered,
        temperature=config.evaluation.temperature,
        seed=VALIDATION_SEED,
    )
    batches = t.rollouts.sample(mine, request, stop, num_batches(config, len(prompts)))

    # Likelihood of the reference answers, behind each chain and behind none
    rollouts: list[Rollout] = []
    parts: list[Scored] = []
    no_chain = t.splicer.supervised(mine, "marked_answer")
    for batch in batches:
        rollouts += batch
        sequences = t.splicer.splice_reference(mine, batch)
        behind_none = [no_chain[sequence.group] for sequence in sequences[::size]]
        parts.append(score(t.actor, SplicedBatch(sequences=sequences, group_size=size, no_chain=behind_none)))
    everything = [(part, group) for part in parts for group in range(len(part.groups.valid_mask))]
    scored = assembled(everything, like=parts[0].batch)
    assert scored.groups.no_chain_logprobs is not None
    no_chain_logprob = scored.groups.no_chain_logprobs.sum(-1)
    gain = chain_gain(scored.groups, no_chain_logprob)
    metrics = likelihoods(scored.groups) | rollout_metrics(scored.sequences, rollouts, scored.policy, t.actor.num_steps)
    metrics["no_chain_nll"] = mean(-no_chain_logprob, torch.ones_like(no_chain_logprob, dtype=torch.bool))
    metrics["chain_gain"] = mean(gain, scored.groups.valid_mask)
    if scored.reference is not None:
        metrics["kl"] = mean(scored.groups.chain_log_ratio, scored.groups.arrived_mask)

    # Own answers, sampled and the likeliest one
    verdicts = grade(t.verifier, t.splicer, layout, mine, rollouts) if config.evaluation.verify else None
    if verdicts is not None:
        metrics |= sampled_answers(t, mine, rollouts, verdicts, size if answered else 1)
    metrics |= oracle_accuracies(t, mine, rollouts)
    if answered and config.evaluation.greedy:
        greedy = replace(request, num_generations_per_prompt=1, temperature=0.0)
        sync_weights(t)  # servers that sleep after every batch have none
        (likeliest,) = t.rollouts.sample(mine, greedy, stop)
        metrics |= greedy_answers(t, mine, likeliest)
    means = merge(metrics, layout.sum_over_data_parallel) | medians(t, scored.groups, gain, place, len(prompts))
    asked = config.evaluation.pass_rates is not None
    rates = pass_rates(scored.groups, verdicts, place, prompts, layout.sum_over_data_parallel) if asked else []
    records = first_samples(t, mine, rollouts, scored, no_chain_logprob)
    return Evaluated(means | combined_accuracies(means), records, rates)


def reads_own_answers(config: Config, prompts: Sequence[Prompt]) -> bool:
    """Whether somebody reads what follows the marker: an oracle, a judge, or a verifier that can grade a prompt."""
    judged = config.evaluation.judge.url or config.evaluation.model_verifier.url
    graded = config.evaluation.verify and (judged or any(prompt.verifiable for prompt in prompts))
    return config.data.name in ORACLES or bool(graded)


def num_batches(config: Config, num_prompts: int) -> int:
    """How many batches are scored: where servers go on sampling meanwhile, one for the prompts of a step; else one."""
    if not config.rollout.kind.can_run_ahead:
        return 1
    return max(1, math.ceil(num_prompts / config.trainer.jepo.num_prompts_per_step))


def medians(t: Trainer, groups: GroupScores, gain: Tensor, place: Sequence[int], num_prompts: int) -> dict[str, float]:
    """Medians over the prompts of all replicas: of the proxy NLL, infinite without a valid sample, and of the gain."""
    num_valid = groups.valid_mask.sum(-1)
    values = {
        "proxy_nll_median": proxy_nll(groups),
        "chain_gain_median": torch.where(num_valid > 0, gain.sum(-1) / num_valid, math.nan),
    }
    reduce_sum = t.layout.sum_over_data_parallel
    found = {name: median_over_prompts(value, place, num_prompts, reduce_sum) for name, value in values.items()}
    return {name: value for name, value in found.items() if value is not None}


def pass_rates(
    groups: GroupScores,
    verdicts: Sequence[float | None] | None,
    place: Sequence[int],
    prompts: Sequence[Prompt],
    reduce_sum: Callable[[Tensor], Tensor],
) -> list[dict[str, Any]]:
    """How well the model answers each question, as `nemo_jepo.lessons` has it; every replica calls.

    Args:
        groups: this replica's P prompts.
        verdicts: the verifier's on their samples, [P * G]; None where it was not asked.
        place: where the P stand among all prompts.
        prompts: of all replicas.
        reduce_sum: over replicas.
    Returns:
        question, pass_rate, num_samples (those that arrived) and by (verifier, or likelihood where it cannot tell), of
        each prompt with a sample; the same on every rank.
    """
    by_verifier = [prompt.verifiable and verdicts is not None for prompt in prompts]
    if verdicts is not None:
        reward = torch.tensor([math.nan if verdict is None else verdict for verdict in verdicts], dtype=torch.float64)
        groups = replace(groups, verifiable_reward=reward.view_as(groups.answer_logprob))
    rate = pass_rate(groups, torch.tensor([by_verifier[one] for one in place], dtype=torch.bool))
    everywhere = torch.zeros(len(prompts), 2, dtype=torch.float64)
    everywhere[list(place)] = torch.stack([rate, groups.arrived_mask.sum(-1).double()], dim=-1)
    return [
        {
            "question": prompt.question,
            "pass_rate": known,
            "num_samples": int(count),
            "by": "verifier" if verified else "likelihood",
        }
        for prompt, verified, (known, count) in zip(prompts, by_verifier, reduce_sum(everywhere).tolist(), strict=True)
        if count
    ]


def sampled_answers(
    t: Trainer, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], verdicts: Sequence[float | None], size: int
) -> dict[str, Pair]:
    """What the verifier, and the judges after it, say of the samples' own answers.

    Args:
        verdicts: the verifier's.
        size: k of the metrics over a prompt's k samples; 1 for none of them.
    """
    layout = t.layout
    answers = [t.splicer.own_answer_text(rollout) for rollout in rollouts]
    graded = arrived(rollouts, answers, verdicts)
    metrics = {
        "accuracy": accuracy(graded),
        "verifier_faults": verifier_faults(graded, layout),
    }
    if size > 1:
        metrics |= accuracies_at_k(graded, size)
    if t.config.data.verifier == "judgement":
        samples = zip(rollouts, answers, strict=True)
        read = {(one.group, one.sample): text for one, text in samples if one.finish_reason != "failed"}
        metrics |= judged_pairs(prompts, read)
    if size > 1 and t.verdicts is not None:
        metrics |= verified_at_k(graded, own_confidences(t, t.verdicts, prompts, rollouts, size), size)
    judges = Judges(t.config.evaluation, Path(t.config.exp_manager.exp_dir), t.servers)
    return metrics | judged_answers(judges, layout, cases_to_judge(prompts, rollouts, answers, verdicts), len(graded))


def own_confidences(
    t: Trainer, verdicts: VerdictWriter, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], size: int
) -> list[float]:
    """pi(yes) behind the own answer of each sample that arrived, 0 where it has none; all ranks call."""
    sequences = verdicts.claims(t.splicer.splice_own(prompts, rollouts))
    scored = score(t.actor, SplicedBatch(sequences=sequences, group_size=size), read_reference=False)
    return [
        math.exp(values[-sequence.verdict_length :].sum().item()) if sequence.verdict_length else 0.0
        for sequence, values in zip(sequences, scored.policy.policy_logprobs, strict=True)
        if not sequence.failed
    ]


def greedy_answers(t: Trainer, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> dict[str, Pair]:
    """The same of the likeliest completion of each prompt."""
    metrics: dict[str, Pair] = {}
    if t.config.evaluation.verify:
        verdicts = grade(t.verifier, t.splicer, t.layout, prompts, rollouts)
        answers = [t.splicer.own_answer_text(rollout) for rollout in rollouts]
        graded = arrived(rollouts, answers, verdicts)
        metrics["accuracy_greedy"] = accuracy(graded)
        metrics["verifier_faults_greedy"] = verifier_faults(graded, t.layout)
    if true := oracle_accuracies(t, prompts, rollouts):
        metrics["oracle_accuracy_greedy"] = true["oracle_accuracy"]
    return metrics


def verifier_faults(graded: Sequence[Graded], layout: Layout) -> Pair:
    """How many answers have no verdict: summed over replicas, and counted once."""
    return float(sum(one.verdict is None for one in graded)), float(layout.data_parallel_rank == 0)


def arrived(
    rollouts: Sequence[Rollout], answers: Sequence[str | None], verdicts: Sequence[float | None]
) -> list[Graded]:
    """The samples that arrived, with what there is of each: one rollout, answer and verdict a sample."""
    return [
        Graded(rollout.group, answer, verdict)
        for rollout, answer, verdict in zip(rollouts, answers, verdicts, strict=True)
        if rollout.finish_reason != "failed"
    ]


def judged_answers(judges: Judges, layout: Layout, cases: Sequence[Case], num_samples: int) -> dict[str, Pair]:
    """What the configured judges say of the answers that the verifier calls wrong; all ranks of a replica call.

    Args:
        cases: this replica's; only its first rank's are read.
        num_samples: that arrived, of this replica.
    """
    metrics: dict[str, Pair] = {}
    for name in judges.names:
        with phase(ALONE):  # the other ranks wait, as long as the judges take
            verdicts = layout.share_in_replica(judges.ask(name, cases) if layout.is_replica_head else None)
        metrics |= judge_metrics(name, verdicts, num_samples, layout.data_parallel_rank == 0)
    return metrics


def first_samples(
    t: Trainer, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], scored: Scored, no_chain_logprob: Tensor
) -> list[dict[str, Any]]:
    """Records of one rollout of each of the first few prompts."""
    size = t.config.evaluation.num_generations_per_prompt
    firsts = slice(0, size * t.config.trainer.jepo.log_rollouts, size)
    shown = Scores(scored.policy.policy_logprobs[firsts], scored.policy.entropies[firsts])
    readers = t.tokenizer.decode, t.splicer.marker_span
    records = rollout_records(prompts, scored.sequences[firsts], shown, {}, *readers)
    for record, rollout in zip(records, rollouts[firsts], strict=True):
        record["text"] = t.tokenizer.decode(rollout.token_ids)  # with the own answer, which nothing scores
        logprob = scored.groups.answer_logprob[rollout.group, rollout.sample].item()
        record["no_chain_logprob"] = no_chain_logprob[rollout.group].item()
        record["answer_logprob"] = logprob if record["valid"] else None
        record["chain_gain"] = logprob - record["no_chain_logprob"] if record["valid"] else None
    return records


ORACLES: dict[str, Callable[[Config], ArithmeticOracle | TaskScorer]] = {
    "arithmetic": lambda config: ArithmeticOracle(config.data.arithmetic.answers == "derivation"),
    "reasoning_gym": task_scorer,
}
"""Of generated questions somebody knows which answers are true, whatever the verifier can tell."""


def oracle_accuracies(t: Trainer, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> dict[str, Pair]:
    """How many own answers are true, whatever their form; also of verifiable and unverifiable prompts apart.

    Empty for a data set without an oracle. An answer over which the oracle fails is not true.
    """
    if t.config.data.name not in ORACLES or t.config.data.verifier == "judgement":
        return {}
    with ExitStack() as stack:
        oracle: Grader = t.verifier  # a task's scorer is both
        if t.config.data.verifier != "task":
            oracle = stack.enter_context(closing(ORACLES[t.config.data.name](t.config)))
        verdicts = grade(oracle, t.splicer, t.layout, prompts, rollouts)
    parts: dict[bool, list[float]] = {True: [], False: []}
    for rollout, verdict in zip(rollouts, verdicts, strict=True):
        if rollout.finish_reason != "failed":
            parts[prompts[rollout.group].verifiable].append(verdict or 0.0)
    named = {"": parts[True] + parts[False], "_verifiable": parts[True], "_unverifiable": parts[False]}
    return {f"oracle_accuracy{part}": (sum(truths), float(len(truths))) for part, truths in named.items()}
