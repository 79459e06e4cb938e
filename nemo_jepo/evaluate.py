"""Held-out figures: accuracy of own answers, and the proxy NLL of reference answers, from the same samples.

    proxy NLL = - (logsumexp_i l_i - log n),  l_i = log pi(a*|x, c_i),  c_i ~ pi     (lower is better; n = 4)

Nothing here is a reward. Source: arXiv 2503.19618, Section 4 (evaluation) and Eq. 6.
"""

from collections.abc import Sequence
from typing import Any

import torch

from nemo_jepo.data.oracle import is_true
from nemo_jepo.data.packing import pack
from nemo_jepo.metrics import Pair, merge, rollout_metrics, rollout_records
from nemo_jepo.objective.bounds import effective_sample_size, multi_sample_bound, single_sample_bound
from nemo_jepo.objective.records import GroupScores
from nemo_jepo.objective.tables import group_scores
from nemo_jepo.rewards.judged import combined_accuracies, opinion_figures
from nemo_jepo.rollout.sampler import GenerationRequest
from nemo_jepo.setup import Rooms, collect
from nemo_jepo.types import Prompt, Rollout, Scores, Spliced
from nemo_jepo.weight_sync import sync_weights

VALIDATION_SEED = 0
"""Validation draws from the same random numbers every time, so that steps are compared on equal terms."""


def grade(rooms: Rooms, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[float | None]:
    """1 where the own answer equals the reference answer, 0 where not or where there is none, None after a fault.

    Where the prompt is not verifiable the verifier is not asked, and every own answer has 0. The replica's first rank
    asks the verifier; every rank of the replica must call.
    """
    if rooms.sampler is None:
        return rooms.layout.share_in_replica(None)
    verdicts: list[float | None] = []
    for rollout in rollouts:
        if rollout.finish_reason == "failed":
            verdicts.append(None)
            continue
        prompt = prompts[rollout.group]
        own = rooms.splicer.own_answer_text(rollout) if prompt.verifiable else None
        verdict = False if own is None else rooms.verifier.verify([(own, prompt.answer)])[0]
        verdicts.append(None if verdict is None else float(verdict))
    return rooms.layout.share_in_replica(verdicts)


def evaluate(rooms: Rooms, prompts: Sequence[Prompt]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Figures over the prompts, the same on every rank, and one rollout of each of the first few; all ranks call.

    Returns:
        (figures, records). Figures: accuracy (mean over samples), proxy_nll (nats per answer), proxy_nll_per_token,
        marker_rate, cot_tokens_mean, both bounds and their gap, effective_sample_size, kl, entropy,
        logprob_difference, verifier_faults, for generated problems oracle_accuracy, with a judge those of
        `second_opinions`; one that nothing was measured for is left out. A prompt without a valid sample is in no
        bound: read proxy_nll beside valid_prompt_rate.
    """
    config, layout = rooms.config, rooms.layout
    own_share = prompts[layout.data_parallel_rank :: layout.data_parallel_size]
    size = config.evaluation.num_generations_per_prompt
    has_oracle = config.data.name == "arithmetic"
    sync_weights(rooms)
    request = GenerationRequest(
        num_generations_per_prompt=size,
        max_tokens=config.evaluation.max_tokens or config.rollout.max_tokens,
        stop_at_marker=not (config.evaluation.verify or has_oracle),
        temperature=config.evaluation.temperature,
        seed=VALIDATION_SEED,
    )
    rollouts = collect(rooms, rooms.sampler.submit(own_share, request) if rooms.sampler else None)
    sequences = rooms.splicer.splice_reference(own_share, rollouts)
    rows = pack(sequences, config.model.tokens_per_micro_batch, config.model.segment_multiple)
    scores = rooms.actor.get_inference_log_probs(rows, len(sequences))
    reference = rooms.actor.get_init_policy_logprobs(rows, len(sequences))
    groups = group_scores(sequences, scores, reference, None, size)
    figures = _bounds(groups) | rollout_metrics(sequences, rollouts, scores, rooms.actor.num_steps)
    if reference is not None:
        figures["kl"] = _mean(groups.chain_log_ratio, groups.arrived_mask)
    if config.evaluation.verify:
        verdicts = grade(rooms, own_share, rollouts)
        known = [verdict for verdict in verdicts if verdict is not None]
        figures["accuracy"] = (sum(known), float(len(known)))
        figures["verifier_faults"] = (float(len(verdicts) - len(known)), float(layout.data_parallel_rank == 0))
        figures |= opinion_figures(rooms, own_share, rollouts, verdicts)
    if has_oracle:
        figures |= _oracle_accuracy(rooms, own_share, rollouts)
    means = merge(figures, layout.sum_over_data_parallel)
    return means | combined_accuracies(means), _first_samples(rooms, own_share, sequences, rollouts, scores)


def _first_samples(
    rooms: Rooms,
    prompts: Sequence[Prompt],
    sequences: Sequence[Spliced],
    rollouts: Sequence[Rollout],
    scores: Scores,
) -> list[dict[str, Any]]:
    """Records of one rollout of each of the first few prompts."""
    size = rooms.config.evaluation.num_generations_per_prompt
    firsts = slice(0, size * rooms.config.trainer.jepo.log_rollouts, size)
    shown = Scores(scores.policy_logprobs[firsts], scores.entropies[firsts])
    readers = rooms.tokenizer.decode, rooms.splicer.marker_span
    records = rollout_records(prompts, sequences[firsts], shown, {}, *readers)
    for record, rollout in zip(records, rollouts[firsts], strict=True):
        record["text"] = rooms.tokenizer.decode(rollout.token_ids)  # with the own answer, which nothing scores
    return records


def _oracle_accuracy(rooms: Rooms, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> dict[str, Pair]:
    """How many own answers are true, whatever their form; also of verifiable and unverifiable prompts apart."""
    derivation = rooms.config.data.arithmetic.answers == "derivation"
    known: dict[bool, list[bool]] = {True: [], False: []}
    for rollout in rollouts:
        if rollout.finish_reason != "failed":
            prompt, own = prompts[rollout.group], rooms.splicer.own_answer_text(rollout)
            known[prompt.verifiable].append(own is not None and is_true(prompt.question, own, derivation))
    return {
        name: (float(sum(truths)), float(len(truths)))
        for name, truths in (
            ("oracle_accuracy", known[True] + known[False]),
            ("oracle_accuracy_verifiable", known[True]),
            ("oracle_accuracy_unverifiable", known[False]),
        )
    }


def _bounds(groups: GroupScores) -> dict[str, Pair]:
    logprob, valid = groups.answer_logprob, groups.valid_mask
    has_valid = valid.any(-1)
    multi, single = multi_sample_bound(logprob, valid), single_sample_bound(logprob, valid)
    answer_tokens = torch.where(valid, groups.answer_length, 0).amax(-1)
    return {
        "proxy_nll": _mean(-multi, has_valid),
        "proxy_nll_per_token": (-multi.sum().item(), float(answer_tokens.sum())),
        "bound": _mean(multi, has_valid),
        "single_sample_bound": _mean(single, has_valid),
        "bound_gap": _mean(multi - single, has_valid),
        "effective_sample_size": _mean(effective_sample_size(logprob, valid), has_valid),
        "marker_rate": _mean(groups.has_marker, groups.arrived_mask),
        "valid_prompt_rate": (float(has_valid.sum()), float(has_valid.numel())),
        "cot_tokens_mean": _mean(groups.chain_length, valid),
    }


def _mean(values: torch.Tensor, mask: torch.Tensor) -> Pair:
    return torch.where(mask, values, 0).sum().item(), float(mask.sum().item())
