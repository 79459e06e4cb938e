"""Every number that a step or an evaluation reports, and a few rollouts written out token by token.

A metric is a (sum, count) pair until every data-parallel rank has added its own; one whose count is 0 has nothing to
report. Names follow NeMo-Aligner's prefixes train_rollouts/, train_optim/, val_rollouts/ and timers/. P prompts, G
samples per prompt.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_jepo.config.objectives import OBJECTIVES
from nemo_jepo.data.splice import REPLACEMENT
from nemo_jepo.objective.estimators import effective_sample_size, masked, multi_sample_bound, single_sample_bound
from nemo_jepo.objective.pairs import compare
from nemo_jepo.objective.records import GroupScores, SampleWeights, Scored, UpdateRule
from nemo_jepo.objective.update import verifiable_prompts
from nemo_jepo.types import Pair, Prompt, Rollout, Scores, Spliced


def step_metrics(
    rule: UpdateRule,
    scored: Scored,
    weights: SampleWeights,
    rollouts: Sequence[Rollout],
    policy_version: int,
    sampler_counts: Mapping[str, float],
) -> dict[str, Pair]:
    """Everything that one optimizer step reports of its batch, before the sum over data-parallel ranks.

    Args:
        rule, scored, weights: of the step.
        rollouts: N, in the order of scored.sequences; [] where nothing was sampled (sft).
        policy_version: optimizer steps in the weights that scored.
        sampler_counts: what went wrong in sampling so far, by name.
    """
    metrics = update_metrics(rule, scored.groups, weights)
    if rule.verdict_weight:
        metrics |= verdict_metrics(scored.sequences, scored.policy)
    if rollouts:
        metrics |= rollout_metrics(scored.sequences, rollouts, scored.policy, policy_version)
        metrics |= {name: (count, 1.0) for name, count in sampler_counts.items()}
    return metrics


def mean(values: Tensor, mask: Tensor) -> Pair:
    """Sum of the values over the mask, and how many they are; what stands elsewhere is not read."""
    counted = torch.where(mask, values, torch.zeros_like(values)).double()
    return counted.sum().item(), float(mask.sum().item())


def chain_gain(groups: GroupScores, no_chain_logprob: Tensor) -> Tensor:
    """What a chain adds to the reference answer's log-prob.

        l_i - l0

    Args:
        no_chain_logprob: [P] l0, nats.
    Returns:
        [P, G] nats, 0 where not valid.
    """
    return torch.where(groups.valid_mask, groups.answer_logprob - no_chain_logprob.unsqueeze(-1), 0.0)


def update_metrics(rule: UpdateRule, scores: GroupScores, weights: SampleWeights) -> dict[str, Pair]:
    """Means over the samples or prompts where each metric exists.

    Bounds are in nats of the whole answer whatever reward_normalization says, over prompts scored by likelihood.

    Args:
        rule: settings.
        scores: this rank's groups.
        weights: what `sample_weights` made of them.
    Returns:
        name -> (sum, count). With sft: lengths alone, because nothing else was scored.
    """
    valid, arrived = scores.valid_mask, scores.arrived_mask
    lengths = {
        "cot_tokens_mean": mean(scores.chain_length, valid),
        "answer_tokens_mean": mean(scores.answer_length, valid),
    }
    if OBJECTIVES[rule.name].supervised:
        return lengths
    everything = torch.ones_like(arrived)
    rates = {
        "arrived_rate": mean(arrived | _faulted(scores), everything),
        "marker_rate": mean(scores.has_marker, arrived),
        "valid_rate": mean(valid, arrived),
    }
    clipped = weights.advantage.abs() >= (rule.clip if rule.normalize else torch.inf)
    advantages = {
        "advantage_clip_fraction": mean(clipped, valid),
    }
    return (
        rates
        | lengths
        | advantages
        | _format(rule, scores, weights)
        | _bounds(rule, scores, weights)
        | _chain_gain(scores)
        | _rewards(rule, scores, weights)
        | _pairs(rule, scores)
        | _kl(rule, scores)
    )


def _bounds(rule: UpdateRule, scores: GroupScores, weights: SampleWeights) -> dict[str, Pair]:
    """Bounds and how many samples carry them, over prompts that the reference answer's likelihood scores."""
    mask = scores.valid_mask & ~verifiable_prompts(rule, scores)
    logprob = masked(scores.answer_logprob, mask)
    multi, single = multi_sample_bound(logprob, mask), single_sample_bound(logprob, mask)
    count = float(mask.any(-1).sum().item())
    return {
        "bound": (multi.sum().item(), count),
        "single_sample_bound": (single.sum().item(), count),
        "bound_gap": ((multi - single).sum().item(), count),
        "effective_sample_size": (effective_sample_size(logprob, mask).sum().item(), count),
        "advantage_std": (weights.advantage_std[0].item(), 1.0),
    }


def _chain_gain(scores: GroupScores) -> dict[str, Pair]:
    """What chains add to the reference answer's log-prob, and that without one, where it was scored."""
    if scores.no_chain_logprobs is None:
        return {}
    no_chain = scores.no_chain_logprobs.sum(-1)
    has_valid = scores.valid_mask.any(-1)
    return {
        "chain_gain": mean(chain_gain(scores, no_chain), scores.valid_mask),
        "no_chain_nll": mean(-no_chain, has_valid),
    }


def _format(rule: UpdateRule, scores: GroupScores, weights: SampleWeights) -> dict[str, Pair]:
    """The raw std of the format reward, and how likely a turn ends behind the reference answer."""
    found = {} if rule.format_loss == "none" else {"format_advantage_std": (weights.advantage_std[2].item(), 1.0)}
    if scores.ends_mask is not None and scores.end_logprob is not None:
        found["end_logprob"] = mean(scores.end_logprob, scores.ends_mask)
    return found


def _rewards(rule: UpdateRule, scores: GroupScores, weights: SampleWeights) -> dict[str, Pair]:
    """Verifiable reward over the samples that have one, how many have a fault instead, and the share of prompts that
    train on it."""
    if scores.verifiable_reward is None:
        return {}
    verifiable = verifiable_prompts(rule, scores)
    sampled = scores.arrived_mask | _faulted(scores)
    return {
        "verifier_fault_rate": mean(_faulted(scores), sampled),
        "reward": mean(scores.verifiable_reward, scores.arrived_mask & torch.isfinite(scores.verifiable_reward)),
        "verifiable_prompt_rate": (float(verifiable.sum().item()), float(verifiable.numel())),
        "reward_advantage_std": (weights.advantage_std[1].item(), 1.0),
    }


def _pairs(rule: UpdateRule, scores: GroupScores) -> dict[str, Pair]:
    """How many prompts have a pair, how well the policy tells its samples apart, and how long they are."""
    if not OBJECTIVES[rule.name].compares_pairs:
        return {}
    pairs = compare(rule, scores, verifiable_prompts(rule, scores))
    places = torch.stack([pairs.chosen, pairs.rejected], -1)
    of_chosen, of_rejected = pairs.tokens.gather(-1, places).unbind(-1)
    found = {
        "pair_rate": mean(pairs.has_pair, scores.arrived_mask.any(-1)),
        "pair_margin": mean(rule.pair_beta * pairs.margin, pairs.has_pair),
        "pair_accuracy": mean(pairs.margin > 0, pairs.has_pair),
        "chosen_tokens_mean": mean(of_chosen, pairs.has_pair),
        "rejected_tokens_mean": mean(of_rejected, pairs.has_pair),
    }
    if rule.unverifiable == "score" and scores.verifiable_reward is not None:
        of_chosen, of_rejected = scores.verifiable_reward.gather(-1, places).unbind(-1)
        found["chosen_reward_mean"] = mean(of_chosen, pairs.has_pair)
        found["rejected_reward_mean"] = mean(of_rejected, pairs.has_pair)
    return found


def _faulted(scores: GroupScores) -> Tensor:
    """[P, G] bool: samples about which the verifier came to no verdict."""
    return torch.zeros_like(scores.arrived_mask) if scores.faulted_mask is None else scores.faulted_mask


def _kl(rule: UpdateRule, scores: GroupScores) -> dict[str, Pair]:
    """KL(pi, pi_ref) of a chain of thought, in nats per sequence: k1 as `kl`, k3 beside it."""
    if rule.kl_beta == 0:
        return {}
    metrics = {"kl": mean(scores.chain_log_ratio, scores.arrived_mask)}
    if scores.chain_k3 is not None:
        metrics["kl_k3"] = mean(scores.chain_k3, scores.arrived_mask)
    return metrics


def rollout_metrics(
    sequences: Sequence[Spliced], rollouts: Sequence[Rollout], scores: Scores, policy_version: int
) -> dict[str, Pair]:
    """Metrics of the sampled tokens.

        logprob_difference = mean |log pi_sampler - log pi_trainer| over sampled tokens that were scored, nats
        entropy            = mean over chain-of-thought tokens, nats
        reasoning_tokens_mean = tokens of a valid chain before the marker

    The difference is of untempered samples alone: at another temperature log-probs differ from the trainer's without a
    fault.

    Args:
        sequences, rollouts: N, in the same order.
        scores: under the trainer's weights.
        policy_version: of those weights; staleness is how far behind it the sampler was.
    """
    arrived = [not sequence.failed for sequence in sequences]
    valid = [sequence for sequence in sequences if sequence.valid and not sequence.failed]
    reasoning = float(sum(sequence.chain_length - sequence.marker_length for sequence in valid))
    difference = entropy = 0.0
    num_sampled = num_chain = 0
    for index, (sequence, rollout) in enumerate(zip(sequences, rollouts, strict=True)):
        sampled = torch.tensor(sequence.generation_logprobs if rollout.untempered else ())
        difference += (sampled - scores.policy_logprobs[index][: len(sampled)]).abs().sum().item()
        entropy += scores.entropies[index][: sequence.chain_length].sum().item()
        num_sampled += len(sampled)
        num_chain += sequence.chain_length
    count = float(sum(arrived))
    return {
        "reasoning_tokens_mean": (reasoning, float(len(valid))),
        "misaligned_rate": (float(sum(sequence.misaligned for sequence in sequences)), count),
        "cut_off_rate": (float(sum(rollout.finish_reason == "length" for rollout in rollouts)), count),
        "response_tokens_mean": (float(sum(len(rollout.token_ids) for rollout in rollouts)), count),
        "staleness_mean": (float(sum(policy_version - r.policy_version for r in rollouts if r.token_ids)), count),
        "logprob_difference": (difference, float(num_sampled)),
        "entropy": (entropy, float(num_chain)),
    }


def verdict_metrics(sequences: Sequence[Spliced], scores: Scores) -> dict[str, Pair]:
    """What a policy that verifies itself says of its own answers, where their reward is known.

        verdict_yes_rate    share of answers that are right: the balance of the two classes
        verdict_nll         mean of -log pi(verdict | chain, answer, question), nats
        verdict_accuracy    share of verdicts of probability above 1/2

    Args:
        sequences: those with a verdict count.
        scores: of all of them.
    """
    logprobs, num_yes = [], 0
    for sequence, values in zip(sequences, scores.policy_logprobs, strict=False):
        if sequence.verdict is not None:
            logprobs.append(values[-sequence.verdict_length :].sum().item())
            num_yes += sequence.verdict
    count = float(len(logprobs))
    return {
        "verdict_yes_rate": (float(num_yes), count),
        "verdict_nll": (-math.fsum(logprobs), count),
        "verdict_accuracy": (float(sum(logprob > -math.log(2) for logprob in logprobs)), count),
    }


def without_valid_sample(rule: UpdateRule, means: Mapping[str, float]) -> str:
    """Of a batch without a valid sample: why, what still acts on the weights, and what to do.

    Args:
        rule: settings.
        means: of the step, over all ranks.
    """
    acting = ["the KL"] if rule.kl_beta > 0 else []
    if rule.format_weight > 0 and means.get("format_advantage_std"):
        acting.insert(0, "the format loss")
    acts = f"nothing but {' and '.join(acting)} acts" if acting else "nothing acts"
    if means["marker_rate"] == 0:
        todo = "Show solved examples in the prompt, use the model's chat template, or warm up (warmup.max_steps)"
        return f"no completion has the answer marker, so {acts}. {todo}."
    todo = (
        "Look at misaligned_rate (answer.marker ends inside a token), answer.min_cot_tokens and the verifier's faults"
    )
    return f"completions have the answer marker and none is valid, so {acts}. {todo}."


def phase_tokens(sequences: Sequence[Spliced], rollouts: Sequence[Rollout], replicas: int) -> dict[str, int]:
    """Tokens that each timed phase of a step handled, by the timer's name: those of this replica times all replicas.

    Without rollouts (sft) nothing is generated or scored.
    """
    trained = replicas * sum(sequence.length for sequence in sequences)
    if not rollouts:
        return {"train_time": trained}
    generated = replicas * sum(len(rollout.token_ids) for rollout in rollouts)
    return {"train_time": trained, "logprobs": trained, "init_logprobs": trained, "generate": generated}


def merge(metrics: Mapping[str, Pair], reduce_sum: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Means over all data-parallel ranks; a metric without a single count is left out. The same keys on every rank."""
    names = sorted(metrics)
    totals = reduce_sum(torch.tensor([metrics[name] for name in names], dtype=torch.float64))
    return {name: (total / count).item() for name, (total, count) in zip(names, totals, strict=True) if count > 0}


def with_prefix(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """prefix/name for every name."""
    return {f"{prefix}/{name}": value for name, value in metrics.items()}


def rollout_records(
    prompts: Sequence[Prompt],
    sequences: Sequence[Spliced],
    scores: Scores,
    tables: Mapping[str, Tensor],
    decode: Callable[[Sequence[int]], str],
    marker_span: Callable[[Sequence[int]], tuple[int, int] | None],
) -> list[dict[str, Any]]:
    """Sequences as JSON: text, tokens, per-token log-probs, and the sample's entry of every [P, G] table.

    tokens[t] is the text of token_ids[t], from the prompt's first token to the answer's last; the log-probs begin
    with the first token after the prompt.

    Args:
        sequences: those to write, the first of the batch.
        scores: of the batch.
        tables: for example advantage and answer_weight.
        decode: token ids -> text.
        marker_span: generated ids -> first token of the answer marker and the one after its last, None without one.
    """
    records = []
    for index, sequence in enumerate(sequences):
        prompt, start = prompts[sequence.group], sequence.prompt_length
        chain_end = start + sequence.chain_length
        token_ids = sequence.token_ids[: chain_end + sequence.answer_length]
        scored = slice(sequence.chain_length + sequence.answer_length)
        marker = marker_span(sequence.token_ids[start:chain_end])
        records.append(
            {
                "prompt_id": prompt.prompt_id,
                "sample": sequence.sample,
                "prompt": prompt.question,
                "chain_of_thought": decode(sequence.token_ids[start:chain_end]),
                "answer": decode(token_ids[chain_end:]),
                "reference_answer": prompt.answer,
                "valid": sequence.valid,
                "misaligned": sequence.misaligned,
                "failed": sequence.failed,
                "own_answer": sequence.own_answer,
                "prompt_length": start,
                "chain_length": sequence.chain_length,
                "answer_length": sequence.answer_length,
                "marker": None if marker is None else [start + marker[0], start + marker[1]],
                "token_ids": list(token_ids),
                "tokens": token_texts(token_ids, decode),
                "policy_logprobs": [round(value, 5) for value in scores.policy_logprobs[index][scored].tolist()],
                "generation_logprobs": [round(value, 5) for value in sequence.generation_logprobs],
                **{name: table[sequence.group, sequence.sample].item() for name, table in tables.items()},
            }
        )
    return records


def token_texts(token_ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """What each token adds to the text, so that joined they are the text.

    A token is decoded after the ones before it, because alone some decoders drop its space. One that ends inside a
    character adds "", and the token that completes the character adds all of it.
    """
    texts: list[str] = []
    start = read = 0  # ids[start:read] is context whose text is known
    for end in range(1, len(token_ids) + 1):
        known, text = decode(token_ids[start:read]), decode(token_ids[start:end])
        if text.endswith(REPLACEMENT) and end < len(token_ids):
            texts.append("")
        else:
            texts.append(text[len(known) :])
            start, read = read, end
    return texts
