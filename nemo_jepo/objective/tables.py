"""Per-sequence scores as the objective's [P, G] tables.

P prompts of this rank, G sequences per prompt, N = P * G sequences ordered by (group, sample), T tokens of the longest
answer.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_jepo.objective.kl import k1_estimate, k3_estimate
from nemo_jepo.objective.records import GroupScores
from nemo_jepo.types import Scores, Spliced, SplicedBatch


def group_scores(batch: SplicedBatch, scores: Scores, reference: Scores | None = None) -> GroupScores:
    """The objective's tables from what the scoring passes said.

    A fault of the verifier is never better than a wrong answer. Where own answers train (rloo; in jepo_rl, prompts with
    a rewarded sample), the faulted sample has not arrived: no term reaches it, and it is in nobody's baseline, std or
    denominator. In jepo_rl's other prompts every sample counts as wrong, so that the reference answer's likelihood
    scores it, and a faulted one counts like these.

    Args:
        batch: what was scored, in the order of its `to_score`.
        scores: under the current weights.
        reference: under pi_ref; None where none is kept.
    """
    sequences, rewards = batch.sequences, batch.rewards

    def table(values: Sequence[float], dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(values, dtype=dtype).view(-1, batch.group_size)

    answer_logprob, end_logprob, log_ratio, own_answer_log_ratio, k3 = [], [], [], [], []
    for index, sequence in enumerate(sequences):
        policy = scores.policy_logprobs[index].double()[: sequence.chain_length + sequence.answer_length]
        answer_logprob.append(policy[sequence.chain_length :].sum().item())
        end_logprob.append(policy[-1:].sum().item())
        if reference is not None and not sequence.failed:
            ratios = policy - reference.policy_logprobs[index].double()[: len(policy)]
            chain, behind = ratios[: sequence.chain_length], ratios[sequence.chain_length :]
            log_ratio.append(k1_estimate(chain).item())
            own_answer_log_ratio.append(behind.sum().item() if sequence.own_answer else 0.0)
            k3.append(k3_estimate(chain).item())
        else:
            log_ratio.append(0.0)
            own_answer_log_ratio.append(0.0)
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
        own_answer_log_ratio=None if reference is None else table(own_answer_log_ratio),
        verifiable_reward=None if rewards is None else table([math.nan if one is None else one for one in rewards]),
        faulted_mask=None if rewards is None else table(faulted, torch.bool),
        ends_mask=table([sequence.ends for sequence in sequences], torch.bool),
        end_logprob=table(end_logprob),
        token_logprobs=_answers_by_token(batch, scores),
        initial_token_logprobs=_answers_by_token(batch, reference),
        no_chain_logprobs=_answers_behind_none(batch, scores),
        initial_no_chain_logprobs=_answers_behind_none(batch, reference),
    )


def _answers_by_token(batch: SplicedBatch, scores: Scores | None) -> Tensor | None:
    """[P, G, T] nats, 0 behind an answer's end; None where nobody reads it or it was not scored."""
    if scores is None or not batch.by_token:
        return None
    tokens = _padded_answers(batch, batch.sequences, scores.policy_logprobs[: len(batch.sequences)])
    return tokens.view(len(tokens) // batch.group_size, batch.group_size, tokens.shape[-1])


def _answers_behind_none(batch: SplicedBatch, scores: Scores | None) -> Tensor | None:
    """[P, T] nats, 0 behind an answer's end; None where nobody reads it or it was not scored."""
    if scores is None or batch.no_chain is None:
        return None
    return _padded_answers(batch, batch.no_chain, scores.policy_logprobs[len(batch.sequences) :])


def _padded_answers(batch: SplicedBatch, sequences: Sequence[Spliced], logprobs: Sequence[Tensor]) -> Tensor:
    """[N, T] float64; T is the batch's, whose longest answer may have no valid sample."""
    longest = max((sequence.answer_length for sequence in batch.to_score), default=0)
    padded = torch.zeros(len(sequences), longest, dtype=torch.float64)
    for row, sequence, values in zip(padded, sequences, logprobs, strict=True):
        answer = values[sequence.chain_length :][: sequence.answer_length]
        row[: len(answer)] = answer
    return padded
