"""Per-sequence scores as the objective's [P, G] tables.

P prompts of this rank, G sequences per prompt, N = P * G sequences ordered by (group, sample).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_jepo.objective.kl import k1_estimate, k3_estimate
from nemo_jepo.objective.records import GroupScores
from nemo_jepo.types import Scores, Spliced


def group_scores(
    sequences: Sequence[Spliced],
    scores: Scores,
    reference: Scores | None,
    rewards: Sequence[float | None] | None,
    group_size: int,
) -> GroupScores:
    """The objective's tables from what the scoring passes said.

    A fault of the verifier is never better than a wrong answer. Where own answers train (rloo; in jepo_rl, prompts with
    a rewarded sample), the faulted sample has not arrived: no term reaches it, and it is in nobody's baseline, std or
    denominator. In jepo_rl's other prompts every sample counts as wrong, so that the reference answer's likelihood
    scores it, and a faulted one counts like these.

    Args:
        sequences: N, ordered by (group, sample).
        scores: under the current weights.
        reference: under pi_ref; None when beta = 0.
        rewards: verifiable reward of each sequence; None inside where it could not be had: a fault, or a failed sample.
        group_size: G.
    """

    def table(values: Sequence[float], dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(values, dtype=dtype).view(-1, group_size)

    answer_logprob, end_logprob, log_ratio, k3 = [], [], [], []
    for index, sequence in enumerate(sequences):
        policy = scores.policy_logprobs[index].double()
        answer_logprob.append(policy[sequence.chain_length :].sum().item())
        end_logprob.append(policy[-1:].sum().item())
        if reference is not None and not sequence.failed:
            chain = slice(0, sequence.chain_length)
            ratios = policy[chain] - reference.policy_logprobs[index].double()[chain]
            log_ratio.append(k1_estimate(ratios).item())
            k3.append(k3_estimate(ratios).item())
        else:
            log_ratio.append(0.0)
            k3.append(0.0)
    faulted = [False] * len(sequences)
    if rewards is not None:
        faulted = [one is None and not sequence.failed for sequence, one in zip(sequences, rewards, strict=True)]
    arrived = [
        not sequence.failed and not (fault and sequence.own_answer)
        for sequence, fault in zip(sequences, faulted, strict=True)
    ]
    valid = [sequence.valid and there for sequence, there in zip(sequences, arrived, strict=True)]
    return GroupScores(
        answer_logprob=table(answer_logprob),
        valid_mask=table(valid, torch.bool),
        arrived_mask=table(arrived, torch.bool),
        has_marker=table([sequence.has_marker for sequence in sequences], torch.bool),
        chain_length=table([sequence.chain_length for sequence in sequences], torch.int64),
        answer_length=table([sequence.answer_length for sequence in sequences], torch.int64),
        chain_log_ratio=table(log_ratio),
        chain_k3=None if reference is None else table(k3),
        verifiable_reward=None if rewards is None else table([math.nan if one is None else one for one in rewards]),
        faulted_mask=None if rewards is None else table(faulted, torch.bool),
        ends_mask=table([sequence.ends for sequence in sequences], torch.bool),
        end_logprob=table(end_logprob),
    )
