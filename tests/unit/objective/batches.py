"""Random batches with every kind of sample, and how to compare their coefficients."""

import math
from dataclasses import fields, replace

import torch

from nemo_jepo.config.objectives import OBJECTIVES as OBJECTIVES
from nemo_jepo.objective import GroupScores, SampleWeights, UpdateRule
from tests.unit.objective.tabular import PLAIN

SCORING = [name for name, kind in OBJECTIVES.items() if not kind.supervised and not kind.compares_pairs]
"""Objectives that score every sample, and so have advantages, a format loss and a KL."""
PAPER = replace(PLAIN, normalize=True, format_loss="paper", kl_beta=1e-3)
"""App. B.2: scaled, clipped, with format loss and KL."""


ANSWERS = ("answer_logprob", "token_logprobs", "initial_token_logprobs")
"""Tables of what a sample's answer is worth."""


def rule_of(name: str, **changes: object) -> UpdateRule:
    """PLAIN for this objective, with the answer without a chain where it reads one."""
    kind = OBJECTIVES[name]
    no_chain = "initial" if kind.scored_by_initial else "current" if kind.reads_no_chain else "none"
    return replace(PLAIN, name=name, no_chain=no_chain, **changes)


def batch(seed: int = 0, num_prompts: int = 7, level: float = -20.0) -> GroupScores:
    """Random groups of 4 with failed, unmarked and misaligned samples.

    Prompt 0 is whole, 1 has one valid sample, 2 none, and of 3 nothing arrived. The answers' tokens, at most 6, share
    answer_logprob; NaN stands where there is none.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform() -> torch.Tensor:
        return torch.rand(num_prompts, 4, generator=generator, dtype=torch.float64)

    arrived = uniform() < 0.9
    arrived[0], arrived[2], arrived[3] = True, True, False
    has_marker = arrived & (uniform() < 0.8)
    has_marker[0], has_marker[1], has_marker[2] = True, False, False
    arrived[1, 0] = has_marker[1, 0] = True
    valid = has_marker & (uniform() < 0.9)
    valid[0], valid[1, 0] = True, True
    logprob = level + 5 * uniform()
    length = ((uniform() * 5).long() + 1)[:, :1].expand(num_prompts, 4)  # samples of a prompt share the answer
    shares = torch.rand(num_prompts, 4, 6, generator=generator, dtype=torch.float64) + 0.1
    is_token = torch.arange(6) < length.unsqueeze(-1)
    tokens = logprob.unsqueeze(-1) * shares / (shares * is_token).sum(-1, keepdim=True)
    tokens = torch.where(is_token & valid.unsqueeze(-1), tokens, math.nan)
    no_chain = (level + 2) * shares.mean(1) / (shares.mean(1) * is_token[:, 0]).sum(-1, keepdim=True)
    no_chain = torch.where(is_token[:, 0], no_chain, math.nan)
    return GroupScores(
        answer_logprob=logprob,
        valid_mask=valid,
        arrived_mask=arrived,
        has_marker=has_marker,
        chain_length=(uniform() * 9).long() + 1,
        answer_length=length,
        chain_log_ratio=uniform() - 0.4,
        own_answer_log_ratio=uniform() - 0.6,
        verifiable_reward=(valid & (uniform() < 0.4)).double(),
        faulted_mask=torch.zeros_like(arrived),
        ends_mask=valid & (uniform() < 0.8),
        end_logprob=-3 * uniform(),
        token_logprobs=tokens,
        initial_token_logprobs=tokens * 0.99,
        no_chain_logprobs=no_chain,
        initial_no_chain_logprobs=no_chain,
    )


def map_tensors(record, function):
    """A copy of a record with every tensor replaced."""
    tensors = {f.name: getattr(record, f.name) for f in fields(record)}
    return replace(record, **{name: function(name, value) for name, value in tensors.items() if value is not None})


def weights_equal(left: SampleWeights, right: SampleWeights, tolerance: float = 0.0) -> None:
    for field in fields(SampleWeights):
        values = getattr(left, field.name), getattr(right, field.name)
        if values == (None, None):
            continue
        torch.testing.assert_close(*values, rtol=tolerance, atol=tolerance, msg=lambda m, f=field: f"{f.name}: {m}")
