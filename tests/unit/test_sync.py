"""The comparison after a weight sync: it passes equal log-probs, and stops a run whose sampler holds other weights."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from nemo_jepo.data.packing import RowShape
from nemo_jepo.rollout.queue import RolloutQueue
from nemo_jepo.rollout.sampler import GenerationRequest, SamplerMismatch
from nemo_jepo.types import PackedRow, Prompt, Rollout, Scores
from nemo_jepo.weight_sync import PARITY_TOLERANCE, PROBE_TOKENS, check_parity
from tests.support.one_rank import OneRank

PROMPTS = [Prompt(i, (5, 6 + i), "question", "answer") for i in range(2)]
TRAINER = {(7, 8): (-1.0, -2.0), (9,): (-0.5,)}
"""Completion -> log-probs by the trainer."""


class OneProbe:
    """A sampler whose servers report these log-probs, one list a completion."""

    def __init__(self, **servers: Sequence[Sequence[float]]) -> None:
        self.servers = servers

    def probe(self, prompts: Sequence[Prompt], request: GenerationRequest) -> dict[str, list[Rollout]]:
        assert (request.temperature, request.top_p, request.top_k) == (1.0, 1.0, 0)
        return {
            name: [
                Rollout(group, 0, tokens, tuple(logprobs), "length")
                for group, (tokens, logprobs) in enumerate(zip(TRAINER, reported, strict=True))
            ]
            for name, reported in self.servers.items()
        }


class KnownActor:
    """An actor that says of the packed probes what TRAINER says."""

    def __init__(self, layout: OneRank) -> None:
        self.layout = layout
        self.row_shape = RowShape(8)  # several rows

    def get_inference_log_probs(self, rows: Sequence[PackedRow], num_sequences: int) -> Scores:
        scores = {}
        for row in rows:
            for index in row.sequence_index[row.scored_mask].unique().tolist():
                tokens = row.token_ids[row.scored_mask & (row.sequence_index == index)]
                scores[index] = torch.tensor(TRAINER[tuple(tokens.tolist())])
        logprobs = tuple(scores[index] for index in range(num_sequences))
        return Scores(policy_logprobs=logprobs, entropies=logprobs)


def check(sampler: OneProbe, tolerance: float = PARITY_TOLERANCE["fp32"], **layout: Any) -> None:
    one_rank = OneRank(**layout)
    rollouts = RolloutQueue(sampler, one_rank, None, None, max_staleness=0, num_batches=1)
    rollouts.version = 3
    check_parity(KnownActor(one_rank), rollouts, PROMPTS, PROBE_TOKENS, tolerance)


def test_equal_log_probs_pass():
    check(OneProbe(a=[(-1.0, -2.0), (-0.5,)], b=[(-1.00005, -2.0), (-0.5,)]))


def test_a_server_with_other_weights_is_named_with_its_difference():
    with pytest.raises(SamplerMismatch) as stopped:
        check(OneProbe(good=[(-1.0, -2.0), (-0.5,)], stale=[(-1.03, -1.97), (-0.5,)]))
    line = str(stopped.value)
    assert "step 3" in line and "stale: 0.02 nats" in line and "good" not in line  # (0.03 + 0.03 + 0) / 3
    assert "parity_tolerance=0.0001" in line and "\n" not in line


def test_half_precision_and_the_user_may_allow_more():
    almost = OneProbe(a=[(-1.09, -2.09), (-0.59,)])
    check(almost, PARITY_TOLERANCE["bf16"])
    check(almost, 0.1)
    with pytest.raises(SamplerMismatch):
        check(almost, 0.05)


def test_a_difference_that_is_not_a_number_is_no_parity():
    with pytest.raises(SamplerMismatch):
        check(OneProbe(a=[(float("nan"), -2.0), (-0.5,)]))


def test_a_mismatch_on_another_replica_stops_this_one_too():
    with pytest.raises(SamplerMismatch, match="on another replica"):
        check(OneProbe(a=[(-1.0, -2.0), (-0.5,)]), any_over_world=lambda flag: True)


def test_without_probes_there_is_nothing_to_compare():
    check(OneProbe())
