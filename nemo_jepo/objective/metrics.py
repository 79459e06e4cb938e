"""What is reported of a batch, as additive (numerator, denominator) pairs.

Sum both over data-parallel ranks, then divide; a pair with denominator 0 has nothing to report. P prompts, G samples.
"""

import torch
from torch import Tensor

from nemo_jepo.objective.bounds import effective_sample_size, multi_sample_bound, single_sample_bound
from nemo_jepo.objective.groups import masked
from nemo_jepo.objective.records import GroupScores, SampleCredits, UpdateRule
from nemo_jepo.objective.registry import uses_verifiable_reward

Pair = tuple[float, float]


def update_metrics(rule: UpdateRule, scores: GroupScores, credits: SampleCredits) -> dict[str, Pair]:
    """Means over the samples or prompts where each figure exists.

    Bounds are in nats of the whole answer whatever length_normalization says, over prompts scored by likelihood.

    Args:
        rule: settings.
        scores: this rank's groups.
        credits: what `sample_credits` made of them.
    Returns:
        name -> (sum, count). With sft: lengths alone, because nothing else was scored.
    """
    valid, arrived = scores.valid_mask, scores.arrived_mask
    lengths = {
        "cot_tokens_mean": _mean(scores.chain_length, valid),
        "answer_tokens_mean": _mean(scores.answer_length, valid),
    }
    if rule.name == "sft":
        return lengths
    everything = torch.ones_like(arrived)
    rates = {
        "arrived_rate": _mean(arrived, everything),
        "marker_rate": _mean(scores.has_marker, arrived),
        "valid_rate": _mean(valid, arrived),
    }
    clipped = credits.advantage.abs() >= (rule.clip if rule.normalize else torch.inf)
    advantages = {
        "advantage_clip_fraction": _mean(clipped, valid),
        "format_advantage_std": (credits.advantage_std[2].item(), 1.0),
    }
    return (
        rates
        | lengths
        | advantages
        | _bounds(rule, scores, credits)
        | _rewards(rule, scores, credits)
        | _kl(rule, scores)
    )


def _mean(values: Tensor, mask: Tensor) -> Pair:
    return masked(values, mask).sum().item(), float(mask.sum().item())


def _verifiable(rule: UpdateRule, scores: GroupScores) -> Tensor:
    reward = scores.verifiable_reward
    return uses_verifiable_reward(rule.name, torch.zeros_like(scores.answer_logprob) if reward is None else reward)


def _bounds(rule: UpdateRule, scores: GroupScores, credits: SampleCredits) -> dict[str, Pair]:
    """Bounds and how many samples carry them, over prompts that the reference answer's likelihood scores."""
    mask = scores.valid_mask & ~_verifiable(rule, scores).unsqueeze(-1)
    logprob = masked(scores.answer_logprob, mask)
    multi, single = multi_sample_bound(logprob, mask), single_sample_bound(logprob, mask)
    count = float(mask.any(-1).sum().item())
    return {
        "bound": (multi.sum().item(), count),
        "single_sample_bound": (single.sum().item(), count),
        "bound_gap": ((multi - single).sum().item(), count),
        "effective_sample_size": (effective_sample_size(logprob, mask).sum().item(), count),
        "advantage_std": (credits.advantage_std[0].item(), 1.0),
    }


def _rewards(rule: UpdateRule, scores: GroupScores, credits: SampleCredits) -> dict[str, Pair]:
    """Verifiable reward over every arrived sample, and the share of prompts that train on it."""
    if scores.verifiable_reward is None:
        return {}
    verifiable = _verifiable(rule, scores)
    return {
        "reward": _mean(scores.verifiable_reward, scores.arrived_mask & torch.isfinite(scores.verifiable_reward)),
        "verifiable_prompt_rate": (float(verifiable.sum().item()), float(verifiable.numel())),
        "reward_advantage_std": (credits.advantage_std[1].item(), 1.0),
    }


def _kl(rule: UpdateRule, scores: GroupScores) -> dict[str, Pair]:
    """KL(pi, pi_ref) of a chain of thought, in nats per sequence: k1 as `kl`, k3 beside it."""
    if rule.kl_beta == 0:
        return {}
    figures = {"kl": _mean(scores.chain_log_ratio, scores.arrived_mask)}
    if scores.chain_k3 is not None:
        figures["kl_k3"] = _mean(scores.chain_k3, scores.arrived_mask)
    return figures
