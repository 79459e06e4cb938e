"""The comparison after a weight sync: it passes equal log-probs, and stops a run whose sampler holds other weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_jepo import weight_sync
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


# ---- which weights samplers train on ---------------------------------------------------------------------------------


class CountingActor:
    """Weights that are the number of their step; what is kept takes their place for a while."""

    def __init__(self) -> None:
        self.num_steps, self.sampler_policy_step, self._held = 0, None, 0

    def keep_sampler_policy(self) -> None:
        self.sampler_policy_step = self.num_steps

    @contextmanager
    def with_sampler_policy(self) -> Iterator[None]:
        self.num_steps, self._held = self.sampler_policy_step, self.num_steps
        yield
        self.num_steps = self._held


def pushes(monkeypatch, interval: int | None, steps: int, validate_at: Sequence[int] = (), resume_at: int = -1):
    """Per step the weights that samples come from, and how many pushes were made in all."""
    pushed, sampled_with = [], []
    actor = CountingActor()
    rollouts = SimpleNamespace(version=-1)
    config = SimpleNamespace(rollout=SimpleNamespace(sync_interval=interval))
    t = SimpleNamespace(actor=actor, rollouts=rollouts, config=config)

    def push(t, step: int) -> None:
        pushed.append((t.actor.num_steps, step))
        t.rollouts.version = step

    monkeypatch.setattr(weight_sync, "_push", push)
    if interval != 1:
        actor.keep_sampler_policy()  # the initial weights, when the run is built
    for step in range(steps):
        if step == resume_at:
            rollouts.version = -1
            if interval is not None and step % interval == 0:
                actor.sampler_policy_step = None
        if step in validate_at:
            weight_sync.sync_weights(t)
        weight_sync.sync_for_training(t)
        sampled_with.append(rollouts.version)
        actor.num_steps += 1
    assert all(held == said for held, said in pushed)
    return sampled_with, len(pushed)


@pytest.mark.parametrize(
    ("interval", "sampled_with", "num_pushes"),
    [(1, [0, 1, 2, 3, 4, 5, 6], 7), (2, [0, 0, 2, 2, 4, 4, 6], 4), (5, [0, 0, 0, 0, 0, 5, 5], 2), (None, [0] * 7, 1)],
)
def test_samplers_get_weights_every_so_many_steps_and_offline_once(monkeypatch, interval, sampled_with, num_pushes):
    assert pushes(monkeypatch, interval, 7) == (sampled_with, num_pushes)


@pytest.mark.parametrize("interval", [1, 2, 5, None])
@pytest.mark.parametrize("at", [0, 1, 2, 3, 5])
def test_a_validation_and_a_resumption_leave_the_samples_those_of_the_same_weights(monkeypatch, interval, at):
    expected, _ = pushes(monkeypatch, interval, 7)
    assert pushes(monkeypatch, interval, 7, validate_at=[at])[0] == expected
    assert pushes(monkeypatch, interval, 7, resume_at=at)[0] == expected
