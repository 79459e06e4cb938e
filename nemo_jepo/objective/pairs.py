"""DPO: of a prompt's samples one is chosen, one is rejected, and the update tells the two apart.

    loss   = - 1/P sum over prompts with a pair of  log sigmoid(beta * margin)
    margin = [log pi(y+) - log pi_ref(y+)] - [log pi(y-) - log pi_ref(y-)],    log pi(y) = sum over sampled tokens of y

    - d loss / d log pi(y+_t)  =  beta sigmoid(-beta * margin) / P  =  d loss / d log pi(y-_t)

So it is one detached weight per token as every objective: positive on the chosen sample, negative on the rejected one,
zero elsewhere. What is compared depends on the prompt:

    a verifier rewards a sample    y = chain and own answer; the first right one over the first wrong one
    elsewhere                      y = chain up to the marker; the one behind which the reference answer is likeliest
                                   over the one behind which it is least likely
    elsewhere, with                y = chain and own answer; the one that a judge gives the highest score over the one
    unverifiable=score             that it gives the lowest; one without a score is in no pair

A sample without the marker has no own answer, so it is wrong, and the reference answer has likelihood 0 behind it. One
whose marker ends inside a token is compared by its own answer alone.

P prompts, G samples per prompt. Source: arXiv 2305.18290 (DPO, Eq. 7), arXiv 2506.21495 (online, pairs by rule).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nemo_jepo.objective.estimators import share, share_of_prompt
from nemo_jepo.objective.records import GroupScores, Reduce, SampleWeights, UpdateRule, only_rank


class Pairs(NamedTuple):
    """One pair of each prompt; numbers where has_pair is False mean nothing."""

    chosen: Tensor
    """[P] int64: which sample."""
    rejected: Tensor
    """[P] int64: which sample."""
    has_pair: Tensor
    """[P] bool: one sample is better than another."""
    margin: Tensor
    """[P] nats; 0 where nobody kept a reference policy, because the reference is the policy itself."""
    tokens: Tensor
    """[P, G] int: sampled tokens that are compared."""


def compare(rule: UpdateRule, scores: GroupScores, verifiable: Tensor) -> Pairs:
    """The pair of every prompt.

    The best and the worst by value, the first where several are; with reject_longest the longest of those that are
    worse than the best, against answers that grow.

    Args:
        rule: reject_longest is read.
        scores: of this rank's groups.
        verifiable: [P, 1] bool: prompts that are compared by a reward of own answers.
    """
    by_likelihood = torch.where(scores.valid_mask, scores.answer_logprob.double(), -torch.inf)
    candidates = scores.arrived_mask & (verifiable | scores.valid_mask | ~scores.has_marker)
    value = by_likelihood
    if scores.verifiable_reward is not None:
        value = torch.where(verifiable, scores.verifiable_reward.double(), by_likelihood)
        candidates = candidates & ~torch.isnan(value)
    best = torch.where(candidates & scores.valid_mask, value, -torch.inf)
    chosen = best.argmax(-1)
    largest = best.gather(-1, chosen.unsqueeze(-1))
    worse = candidates & (value < largest)
    tokens = scores.chain_length + scores.answer_length * (verifiable & scores.valid_mask)
    if rule.reject_longest:
        rejected = torch.where(worse, tokens, -1).argmax(-1)
    else:
        rejected = torch.where(worse, value, torch.inf).argmin(-1)
    ratio = scores.chain_log_ratio.double()
    if scores.own_answer_log_ratio is not None:
        ratio = ratio + scores.own_answer_log_ratio.double()
    of_chosen, of_rejected = ratio.gather(-1, torch.stack([chosen, rejected], -1)).unbind(-1)
    has_pair = worse.any(-1)
    return Pairs(chosen, rejected, has_pair, torch.where(has_pair, of_chosen - of_rejected, 0.0), tokens)


def preference_weight(beta: float, margin: Tensor) -> Tensor:
    """How far a pair is from being told apart.

        beta * sigmoid(-beta * margin)

    Args:
        beta: of DPO.
        margin: [P] nats.
    Returns:
        [P], from 0 (told apart) to beta.
    """
    return beta * torch.sigmoid(-beta * margin)


def pair_weights(
    rule: UpdateRule, scores: GroupScores, verifiable: Tensor, reduce_sum: Reduce = only_rank
) -> SampleWeights:
    """Weights of DPO: of the chosen and of the rejected sample of each prompt, and of no other.

        policy_weight = +- beta sigmoid(-beta * margin) / P_mean

    P_mean as in `nemo_jepo.objective.update`, where a prompt is valid if it has a pair: one without has no weight.

    Args:
        rule: settings.
        scores: this rank's groups, whole groups only.
        verifiable: [P, 1] bool: prompts that are compared by a reward of own answers.
        reduce_sum: sum over the data-parallel group; called once, on [2] float64.
    Returns:
        SampleWeights; advantage is the same without the denominator, over beta.
    Source: arXiv 2305.18290, Eq. 7.
    """
    pairs = compare(rule, scores, verifiable)
    counts = [scores.arrived_mask.any(-1).sum(), pairs.has_pair.sum()]
    arrived, paired = reduce_sum(torch.stack(counts).double()).unbind()
    weight = preference_weight(rule.pair_beta, pairs.margin) * pairs.has_pair
    signed = torch.zeros_like(scores.answer_logprob).double()
    signed.scatter_add_(-1, pairs.chosen.unsqueeze(-1), weight.unsqueeze(-1))
    signed.scatter_add_(-1, pairs.rejected.unsqueeze(-1), -weight.unsqueeze(-1))
    nothing = torch.zeros_like(signed)
    per_sample = rule.verdict_weight * share_of_prompt(scores.arrived_mask) * share(arrived)
    return SampleWeights(
        policy_weight=signed * share(arrived if rule.prompt_mean == "all" else paired),
        answer_weight=nothing,
        end_weight=nothing,
        kl_weight=nothing,
        advantage=signed / rule.pair_beta,
        advantage_std=nothing.new_zeros(3),
        verdict_weight=per_sample if rule.verdict_weight else None,
    )
