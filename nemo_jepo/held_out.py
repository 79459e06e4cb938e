"""What held-out samples say of a model: likelihood of the reference answer, gain of the chain, right answers in k.

P prompts of this replica, G samples per prompt. l_i is the reference answer's log-prob behind chain i, l0 behind no
chain at all, nats. A sample that never arrived is no sample. One without the marker is one: it holds no answer, and no
metric of quality is better for it. Nothing here is a reward.

Source: arXiv 2503.19618, Section 4 and Eq. 6; arXiv 2107.03374, Eq. 1 (pass@k).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from nemo_jepo.metrics import mean
from nemo_jepo.objective.estimators import effective_sample_size, multi_sample_bound, single_sample_bound
from nemo_jepo.objective.records import GroupScores
from nemo_jepo.rewards.claims import as_claim, folded
from nemo_jepo.rewards.judgement import can_be_read, consistent, is_right, partner_of
from nemo_jepo.types import Pair, Prompt

# ---- likelihood of the reference answer ------------------------------------------------------------------------------


def proxy_nll(groups: GroupScores) -> Tensor:
    """Negative log of the reference answer's mean likelihood over ALL samples of a prompt.

        -( logsumexp_valid(l_i) - log n ),   n = samples that arrived; a sample without the marker has likelihood 0

    Returns:
        [P] nats; infinite where no sample is valid, NaN where none arrived.
    """
    num_valid, num_arrived = groups.valid_mask.sum(-1).double(), groups.arrived_mask.sum(-1).double()
    bound = multi_sample_bound(groups.answer_logprob, groups.valid_mask)
    nll = num_arrived.log() - num_valid.log() - bound  # log 0 = -inf: no valid sample
    return torch.where(num_arrived > 0, nll, math.nan)


def likelihoods(groups: GroupScores) -> dict[str, Pair]:
    """Proxy NLL and bounds over prompts with a valid sample, and how many prompts and samples those are."""
    logprob, valid = groups.answer_logprob, groups.valid_mask
    has_valid = valid.any(-1)
    multi, single = multi_sample_bound(logprob, valid), single_sample_bound(logprob, valid)
    nll, answer_tokens = proxy_nll(groups), torch.where(valid, groups.answer_length, 0).amax(-1)
    total, count = mean(nll, has_valid)
    return {
        "proxy_nll": (total, count),
        "proxy_nll_per_token": (total, float(answer_tokens.sum())),
        "proxy_nll_valid": mean(-multi, has_valid),
        "bound": mean(multi, has_valid),
        "single_sample_bound": mean(single, has_valid),
        "bound_gap": mean(multi - single, has_valid),
        "effective_sample_size": mean(effective_sample_size(logprob, valid), has_valid),
        "marker_rate": mean(groups.has_marker, groups.arrived_mask),
        "valid_prompt_rate": mean(has_valid, groups.arrived_mask.any(-1)),
        "cot_tokens_mean": mean(groups.chain_length, valid),
    }


def median_over_prompts(
    values: Tensor, place: Sequence[int], num_prompts: int, reduce_sum: Callable[[Tensor], Tensor]
) -> float | None:
    """The median of one value per prompt, over the prompts of all replicas; every replica calls.

    Args:
        values: [P] of this replica; NaN where a prompt has none, infinite values count.
        place: where they stand among the num_prompts of all replicas.
        reduce_sum: over replicas.
    Returns:
        None where no prompt has a value, or the median is infinite.
    """
    everywhere = torch.zeros(num_prompts, dtype=torch.float64)
    everywhere[list(place)] = values.double()
    known = [value for value in reduce_sum(everywhere).tolist() if not math.isnan(value)]
    middle = median(known) if known else math.inf
    return middle if math.isfinite(middle) else None


# ---- own answers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Graded:
    """What became of one sample that arrived."""

    group: int
    """Which prompt."""
    answer: str | None
    """Its own; None without the marker."""
    verdict: float | None
    """1 right, 0 wrong; None: the verifier failed over it, which counts as wrong."""


def accuracy(graded: Sequence[Graded]) -> Pair:
    """Right answers among all samples that arrived, those without an answer and those of a fault included."""
    return float(sum(one.verdict == 1 for one in graded)), float(len(graded))


def accuracies_at_k(graded: Sequence[Graded], k: int) -> dict[str, Pair]:
    """Means over the prompts of which all k samples arrived, of what these are worth together.

    avg_at_k    right samples / k
    pass_at_j   at least one of j is right, j = 2, 4, .. and k: see `pass_at`
    maj_at_k    the commonest answer is right: see `majority`
    """
    groups: dict[int, list[Graded]] = {}
    for one in graded:
        groups.setdefault(one.group, []).append(one)
    whole = [group for group in groups.values() if len(group) == k]
    right = [sum(one.verdict == 1 for one in group) for group in whole]
    count = float(len(whole))
    sizes = sorted({k, *(2**power for power in range(1, k.bit_length()) if 2**power < k)})
    return {
        f"avg_at_{k}": (sum(right) / k, count),
        **{f"pass_at_{j}": (math.fsum(pass_at(j, k, c) for c in right), count) for j in sizes},
        f"maj_at_{k}": (math.fsum(map(majority, whole)), count),
    }


def pass_at(k: int, num_samples: int, num_right: int) -> float:
    """Share of the subsets of k samples that hold a right one: unbiased for the chance that k fresh samples do.

        1 - C(n - c, k) / C(n, k)

    Source: arXiv 2107.03374, Eq. 1.
    """
    return 1 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def majority(group: Sequence[Graded], weights: Sequence[float] | None = None) -> float:
    """Whether the commonest answer of a prompt is right; where several tie, the share of right ones among them.

    Equal answers have equal text once marks, case and white space are gone: "**42**." is "42", and "0.5" is not "1/2",
    right or wrong alike. To have no answer is an answer too, a wrong one: samples without one never help the others.

    Args:
        weights: of each sample's vote; None: 1.
    """
    votes: dict[str | None, float] = defaultdict(float)
    for one, weight in zip(group, weights or [1.0] * len(group), strict=True):
        votes[_vote(one)] += weight
    most = max(votes.values())
    right = {_vote(one) for one in group if one.verdict == 1}
    winners = [vote for vote, count in votes.items() if count == most]
    return sum(winner in right for winner in winners) / len(winners)


def verified_at_k(graded: Sequence[Graded], confidences: Sequence[float], k: int) -> dict[str, Pair]:
    """What a model's own verdicts add to k samples: means over the prompts of which all k arrived.

    s = pi(yes | x, chain, answer, question), 0 without an answer. For j = 4, 8, 16, .. and k, over the k/j blocks of j
    samples in the order in which they were drawn:

    maj_at_j             the commonest answer is right
    weighted_maj_at_j    the answer is right whose samples have the largest sum of s
    best_at_j            the sample of the largest s is right; where several tie, the share of right ones among them
    verdict_of_right     mean s of right answers
    verdict_of_wrong     mean s of wrong ones, those that are there
    verdict_accuracy     share of answers for which s > 1/2 says whether they are right

    Args:
        graded, confidences: of each sample that arrived, in the order of prompts and samples.
    Source: arXiv 2505.04842 (RL^V): best-of-N and weighted voting.
    """
    groups: dict[int, list[tuple[Graded, float]]] = {}
    for one, confidence in zip(graded, confidences, strict=True):
        groups.setdefault(one.group, []).append((one, confidence))
    whole = [group for group in groups.values() if len(group) == k]
    found: dict[str, Pair] = {}
    for j in sorted({k, *(2**power for power in range(2, k.bit_length()) if 2**power < k)}):
        blocks = [group[first : first + j] for group in whole for first in range(0, k - j + 1, j)]
        share = len(whole) / len(blocks) if blocks else 0.0
        values: dict[str, list[float]] = {"maj": [], "weighted_maj": [], "best": []}
        for block in blocks:
            samples, weights = zip(*block, strict=True)
            values["maj"].append(majority(samples))
            values["weighted_maj"].append(majority(samples, weights))
            best = [one for one, weight in block if weight == max(weights)]
            values["best"].append(sum(one.verdict == 1 for one in best) / len(best))
        for name, of_blocks in values.items():
            found[f"{name}_at_{j}"] = math.fsum(of_blocks) * share, float(len(whole))
    known = [(one, s) for one, s in zip(graded, confidences, strict=True) if one.answer and one.verdict is not None]
    judged = [(one.verdict == 1, s) for one, s in known]
    right, wrong = ([s for is_right, s in judged if is_right == which] for which in (True, False))
    agreed = sum((s > 0.5) == is_right for is_right, s in judged)
    return found | {
        "verdict_of_right": (math.fsum(right), float(len(right))),
        "verdict_of_wrong": (math.fsum(wrong), float(len(wrong))),
        "verdict_accuracy": (float(agreed), float(len(judged))),
    }


def judged_pairs(prompts: Sequence[Prompt], answers: Mapping[tuple[int, int], str | None]) -> dict[str, Pair]:
    """What judgements of pairs are worth (data.verifier=judgement).

    consistent_accuracy    share of pairs whose two judgements are right together
    one_sided_rate         share of pairs of which one judgement is right and one wrong: the verdict follows the place
    unread_rate            share of judgements that cannot be read

    Args:
        prompts: P, each pair whole.
        answers: (prompt, sample) -> own answer of a sample that arrived.
    Source: arXiv 2505.10320 (consistent accuracy; flips).
    """
    partners, references = partner_of(prompts), [prompt.answer.strip() for prompt in prompts]
    pairs = [(place, partners[place], sample) for place, sample in answers if (partners[place], sample) in answers]
    pairs = [pair for pair in pairs if pair[0] < pair[1]]
    both = sum(
        consistent(answers[one, sample], answers[other, sample], references[one], references[other]) is True
        for one, other, sample in pairs
    )
    alone = {key: is_right(text or "", references[key[0]]) for key, text in answers.items()}
    one_sided = sum({alone[one, sample], alone[other, sample]} == {True, False} for one, other, sample in pairs)
    unread = sum(bool(text) and not can_be_read(str(text), references[key[0]]) for key, text in answers.items())
    return {
        "consistent_accuracy": (float(both), float(len(pairs))),
        "one_sided_rate": (float(one_sided), float(len(pairs))),
        "unread_rate": (float(unread), float(len(answers))),
    }


def _vote(one: Graded) -> str | None:
    """What a sample's answer says, as text that equal answers share; None without an answer."""
    if one.answer is None:
        return None
    claim = as_claim(one.answer)
    return folded(one.answer) if claim is None else claim.text
