"""Held-out metrics: accuracy of own answers, and the proxy NLL of reference answers, from the same samples.

    proxy NLL = - (logsumexp_i l_i - log n),  l_i = log pi(a*|x, c_i),  c_i ~ pi     (lower is better; n = 4)

Nothing here is a reward. Source: arXiv 2503.19618, Section 4 (evaluation) and Eq. 6.
"""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from nemo_jepo.actor.parallel import Layout, init_distributed, init_model_parallel
from nemo_jepo.actor.scoring import score
from nemo_jepo.checkpoint.format import latest_checkpoint
from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import Config
from nemo_jepo.config.warmup import started_from
from nemo_jepo.data.dataset import PromptSplits, has_oracle
from nemo_jepo.data.oracle import is_true
from nemo_jepo.data.splice import Splicer
from nemo_jepo.metrics import mean, merge, rollout_metrics, rollout_records
from nemo_jepo.objective.estimators import effective_sample_size, multi_sample_bound, single_sample_bound
from nemo_jepo.objective.records import GroupScores, Scored
from nemo_jepo.objective.tables import group_scores
from nemo_jepo.rewards.judge_prompt import Case
from nemo_jepo.rewards.judged import Judges, cases_to_judge, combined_accuracies, judge_metrics
from nemo_jepo.rewards.verify import Verifier
from nemo_jepo.rollout.build import OwnServers
from nemo_jepo.rollout.sampler import GenerationRequest, never
from nemo_jepo.setup import Trainer, build
from nemo_jepo.types import Pair, Prompt, Rollout, Scores
from nemo_jepo.utils.exit_codes import DONE
from nemo_jepo.weight_sync import sync_weights

VALIDATION_SEED = 0
"""Validation draws from the same random numbers every time, so that steps are compared on equal terms."""


def main(config: Config) -> int:
    """The command: metrics of the run's newest checkpoint, else of the model that the config starts from, as JSON."""
    init_distributed()
    init_model_parallel(config.model)
    folder, layout = config.run_folder, Layout()
    newest = latest_checkpoint(folder / "checkpoints") or latest_checkpoint(folder / "warmup" / "checkpoints")
    if newest is not None:
        config = started_from(config, newest)
    with OwnServers(folder) as servers, closing(build(config, folder, layout, servers, PromptSplits())) as t:
        if not t.validation:
            raise ConfigError("data.validation_path", None, "evaluate reads it", "Add data.validation_path=FILE")
        metrics, _ = evaluate(t, t.validation)
    if layout.rank == 0:
        source = str(newest or config.pretrained_checkpoint.restore_from_path or "random initialisation")
        always = dict.fromkeys(("accuracy", "proxy_nll", "marker_rate", "cot_tokens_mean"))
        if config.evaluation.judge.url is not None:
            always["combined_accuracy"] = None
        print(json.dumps({"model": source, "num_prompts": len(t.validation)} | always | metrics), flush=True)
    return DONE


def evaluate(
    t: Trainer, prompts: Sequence[Prompt], stop: Callable[[], bool] = never
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics over the prompts, the same on every rank, and one rollout of each of the first few; all ranks call.

    Args:
        t: of the run.
        prompts: the same on every rank.
        stop: asked between batches of samples; True on any rank ends the evaluation on all.
    Returns:
        (metrics, records). Metrics: accuracy (mean over samples), proxy_nll (nats per answer), proxy_nll_per_token,
        marker_rate, cot_tokens_mean, both bounds and their gap, effective_sample_size, kl, entropy,
        logprob_difference, verifier_faults, for generated problems oracle_accuracy, with a judge those of
        `nemo_jepo.rewards.judged`; one that nothing was measured for is left out. A prompt without a valid sample is in
        no bound: read proxy_nll beside valid_prompt_rate.
    Raises:
        SamplingStopped: on every rank, where the evaluation was ended.
        SamplersLost, SamplerMismatch: see the sampler.
    """
    config, layout = t.config, t.layout
    mine = prompts[layout.data_parallel_rank :: layout.data_parallel_size]
    size = config.evaluation.num_generations_per_prompt

    # The same samples serve every metric; own answers are decoded where somebody reads them
    sync_weights(t)
    request = GenerationRequest(
        num_generations_per_prompt=size,
        max_tokens=config.evaluation.max_tokens or config.rollout.max_tokens,
        stop_at_marker=not reads_own_answers(config, prompts),
        temperature=config.evaluation.temperature,
        seed=VALIDATION_SEED,
    )
    batches = t.rollouts.sample(mine, request, stop, num_batches(config, len(prompts)))

    # Likelihood of the reference answers
    rollouts: list[Rollout] = []
    parts: list[Scored] = []
    for batch in batches:
        rollouts += batch
        parts.append(score(t.actor, t.splicer.splice_reference(mine, batch), None, size))
    scored = joined(parts, size)
    metrics = bounds(scored.groups) | rollout_metrics(scored.sequences, rollouts, scored.policy, t.actor.num_steps)
    if scored.reference is not None:
        metrics["kl"] = mean(scored.groups.chain_log_ratio, scored.groups.arrived_mask)

    # Own answers
    if config.evaluation.verify:
        verdicts = grade(t.verifier, t.splicer, layout, mine, rollouts)
        known = [verdict for verdict in verdicts if verdict is not None]
        metrics["accuracy"] = (sum(known), float(len(known)))
        metrics["verifier_faults"] = (float(len(verdicts) - len(known)), float(layout.data_parallel_rank == 0))
        judges = Judges(config.evaluation, Path(config.exp_manager.exp_dir), t.servers)
        answers = [t.splicer.own_answer_text(rollout) for rollout in rollouts]
        metrics |= judged_answers(judges, layout, cases_to_judge(mine, rollouts, answers, verdicts), len(known))
    if has_oracle(config.data):
        metrics |= oracle_accuracy(t, mine, rollouts)
    means = merge(metrics, layout.sum_over_data_parallel)
    return means | combined_accuracies(means), first_samples(t, mine, rollouts, scored)


def reads_own_answers(config: Config, prompts: Sequence[Prompt]) -> bool:
    """Whether somebody reads what follows the marker: an oracle, a judge, or a verifier that can grade a prompt."""
    judged = config.evaluation.judge.url or config.evaluation.model_verifier.url
    graded = config.evaluation.verify and (judged or any(prompt.verifiable for prompt in prompts))
    return has_oracle(config.data) or bool(graded)


def num_batches(config: Config, num_prompts: int) -> int:
    """How many batches are scored: where servers go on sampling meanwhile, one for the prompts of a step; else one."""
    if not config.rollout.kind.can_run_ahead:
        return 1
    return max(1, math.ceil(num_prompts / config.trainer.jepo.num_prompts_per_step))


def joined(parts: Sequence[Scored], group_size: int) -> Scored:
    """Batches of this rank that were scored apart, as one; without rows, which count sequences batch by batch."""

    def side_by_side(scores: Sequence[Scores]) -> Scores:
        policy_logprobs = tuple(tensor for one in scores for tensor in one.policy_logprobs)
        return Scores(policy_logprobs, tuple(tensor for one in scores for tensor in one.entropies))

    sequences = [sequence for part in parts for sequence in part.sequences]
    policy = side_by_side([part.policy for part in parts])
    references = [part.reference for part in parts if part.reference is not None]
    reference = side_by_side(references) if references else None
    groups = group_scores(sequences, policy, reference, None, group_size)
    return Scored(sequences=sequences, rows=(), policy=policy, reference=reference, groups=groups)


def grade(
    verifier: Verifier, splicer: Splicer, layout: Layout, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]
) -> list[float | None]:
    """1 where the own answer equals the reference answer, 0 where not or where there is none, None after a fault.

    Where the prompt is not verifiable the verifier is not asked, and every own answer has 0. The replica's first rank
    asks the verifier; every rank of the replica must call.
    """
    if not layout.is_replica_head:
        return layout.share_in_replica(None)
    verdicts: list[float | None] = []
    for rollout in rollouts:
        if rollout.finish_reason == "failed":
            verdicts.append(None)
            continue
        prompt = prompts[rollout.group]
        own = splicer.own_answer_text(rollout) if prompt.verifiable else None
        verdict = False if own is None else verifier.verify([(own, prompt.answer)])[0]
        verdicts.append(None if verdict is None else float(verdict))
    return layout.share_in_replica(verdicts)


def judged_answers(judges: Judges, layout: Layout, cases: Sequence[Case], num_verified: int) -> dict[str, Pair]:
    """What the configured judges say of the answers that the verifier calls wrong; all ranks of a replica call.

    Args:
        cases: this replica's; only its first rank's are read.
        num_verified: samples of this replica about which the verifier said something.
    """
    metrics: dict[str, Pair] = {}
    for name in judges.names:
        verdicts = layout.share_in_replica(judges.ask(name, cases) if layout.is_replica_head else None)
        metrics |= judge_metrics(name, verdicts, num_verified, layout.data_parallel_rank == 0)
    return metrics


def first_samples(
    t: Trainer, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], scored: Scored
) -> list[dict[str, Any]]:
    """Records of one rollout of each of the first few prompts."""
    size = t.config.evaluation.num_generations_per_prompt
    firsts = slice(0, size * t.config.trainer.jepo.log_rollouts, size)
    shown = Scores(scored.policy.policy_logprobs[firsts], scored.policy.entropies[firsts])
    readers = t.tokenizer.decode, t.splicer.marker_span
    records = rollout_records(prompts, scored.sequences[firsts], shown, {}, *readers)
    for record, rollout in zip(records, rollouts[firsts], strict=True):
        record["text"] = t.tokenizer.decode(rollout.token_ids)  # with the own answer, which nothing scores
    return records


def oracle_accuracy(t: Trainer, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> dict[str, Pair]:
    """How many own answers are true, whatever their form; also of verifiable and unverifiable prompts apart."""
    derivation = t.config.data.arithmetic.answers == "derivation"
    known: dict[bool, list[bool]] = {True: [], False: []}
    for rollout in rollouts:
        if rollout.finish_reason != "failed":
            prompt, own = prompts[rollout.group], t.splicer.own_answer_text(rollout)
            known[prompt.verifiable].append(own is not None and is_true(prompt.question, own, derivation))
    return {
        name: (float(sum(truths)), float(len(truths)))
        for name, truths in (
            ("oracle_accuracy", known[True] + known[False]),
            ("oracle_accuracy_verifiable", known[True]),
            ("oracle_accuracy_unverifiable", known[False]),
        )
    }


def bounds(groups: GroupScores) -> dict[str, Pair]:
    """The bounds on the likelihood of the reference answers, over prompts with a valid sample."""
    logprob, valid = groups.answer_logprob, groups.valid_mask
    has_valid = valid.any(-1)
    multi, single = multi_sample_bound(logprob, valid), single_sample_bound(logprob, valid)
    answer_tokens = torch.where(valid, groups.answer_length, 0).amax(-1)
    return {
        "proxy_nll": mean(-multi, has_valid),
        "proxy_nll_per_token": (-multi.sum().item(), float(answer_tokens.sum())),
        "bound": mean(multi, has_valid),
        "single_sample_bound": mean(single, has_valid),
        "bound_gap": mean(multi - single, has_valid),
        "effective_sample_size": mean(effective_sample_size(logprob, valid), has_valid),
        "marker_rate": mean(groups.has_marker, groups.arrived_mask),
        "valid_prompt_rate": (float(has_valid.sum()), float(has_valid.numel())),
        "cot_tokens_mean": mean(groups.chain_length, valid),
    }
