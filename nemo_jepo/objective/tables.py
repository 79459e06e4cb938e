"""Per-sequence scores as the objective's [P, G] tables.

P prompts of this rank, G sequences per prompt, N = P * G sequences ordered by (group, sample).
"""

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

    Args:
        sequences: N, ordered by (group, sample).
        scores: under the current weights.
        reference: under pi_ref; None when beta = 0.
        rewards: verifiable reward of each sequence; None inside where it could not be had (masked, never zero).
        group_size: G.
    """

    def table(values: Sequence[float], dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(values, dtype=dtype).view(-1, group_size)

    answer_logprob, log_ratio, k3 = [], [], []
    for index, sequence in enumerate(sequences):
        policy = scores.policy_logprobs[index].double()
        answer_logprob.append(policy[sequence.chain_length :].sum().item())
        if reference is not None and not sequence.failed:
            chain = slice(0, sequence.chain_length)
            ratios = policy[chain] - reference.policy_logprobs[index].double()[chain]
            log_ratio.append(k1_estimate(ratios).item())
            k3.append(k3_estimate(ratios).item())
        else:
            log_ratio.append(0.0)
            k3.append(0.0)
    has_reward = [True] * len(sequences) if rewards is None else [reward is not None for reward in rewards]
    valid = [
        sequence.valid and not sequence.failed and (known or not sequence.own_answer)
        for sequence, known in zip(sequences, has_reward, strict=True)
    ]
    return GroupScores(
        answer_logprob=table(answer_logprob),
        valid_mask=table(valid, torch.bool),
        arrived_mask=table([not sequence.failed for sequence in sequences], torch.bool),
        has_marker=table([sequence.has_marker for sequence in sequences], torch.bool),
        chain_length=table([sequence.chain_length for sequence in sequences], torch.int64),
        answer_length=table([sequence.answer_length for sequence in sequences], torch.int64),
        chain_log_ratio=table(log_ratio),
        chain_k3=None if reference is None else table(k3),
        verifiable_reward=None if rewards is None else table([reward or 0.0 for reward in rewards]),
    )
