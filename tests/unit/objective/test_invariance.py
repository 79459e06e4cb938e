"""What must not change the update: how the batch is split, what stands at masked positions, a shift of every l_i."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace

import pytest
import torch

from nemo_jepo.objective import (
    GroupScores,
    SampleWeights,
    SequenceLogprobs,
    UpdateRule,
    sample_weights,
)
from nemo_jepo.objective.update import sequence_weights
from tests.unit.objective.batches import OBJECTIVES, PAPER, batch, map_tensors, weights_equal


def on_ranks(rule: UpdateRule, scores: GroupScores, sizes: list[int]) -> SampleWeights:
    """The batch split over threads that reduce among themselves as data-parallel ranks do; weights joined again."""
    barrier, slots = threading.Barrier(len(sizes)), [None] * len(sizes)

    def reducer(rank: int, combine):
        def reduce(tensor: torch.Tensor) -> torch.Tensor:
            slots[rank] = tensor
            barrier.wait(timeout=30)
            result = combine(torch.stack(slots))
            barrier.wait(timeout=30)
            return result

        return reduce

    def run(rank: int) -> SampleWeights:
        begin = sum(sizes[:rank])
        part = map_tensors(scores, lambda name, value: value[begin : begin + sizes[rank]])
        return sample_weights(rule, part, reducer(rank, lambda t: t.sum(0)), reducer(rank, lambda t: t.amax(0)))

    with ThreadPoolExecutor(len(sizes)) as pool:
        parts = list(pool.map(run, range(len(sizes))))
    of_ranks = {f.name: [getattr(part, f.name) for part in parts] for f in fields(SampleWeights)}
    joined = {name: None if values[0] is None else torch.cat(values) for name, values in of_ranks.items()}
    return SampleWeights(**(joined | {"advantage_std": parts[0].advantage_std}))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("scope", ["batch", "group"])
@pytest.mark.parametrize("sizes", [[3, 4], [1, 2, 4], [1] * 7])
def test_a_batch_split_over_ranks_gets_the_weights_of_the_whole(name, scope, sizes):
    rule = replace(PAPER, name=name, std_scope=scope)
    if scope == "group":
        rule = replace(rule, kl_estimator="k1_reward", prompt_mean="valid", format_loss="marker_and_end")
    weights_equal(on_ranks(rule, batch(), sizes), sample_weights(rule, batch()), tolerance=1e-12)


def test_a_rank_that_kept_its_own_std_would_get_other_weights():
    """The test above can fail: without the reduction the two halves are scaled apart."""
    whole = sample_weights(PAPER, batch())
    half = sample_weights(PAPER, map_tensors(batch(), lambda name, value: value[:3]))
    assert (half.policy_weight - whole.policy_weight[:3]).abs().max() > 1e-3


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_what_stands_at_an_invalid_position_changes_no_weight(name, junk):
    rule = replace(PAPER, name=name, kl_estimator="k1_reward")
    clean = batch()
    counts = {"answer_logprob": clean.valid_mask, "chain_log_ratio": clean.arrived_mask}
    counts |= dict.fromkeys(("token_logprobs", "initial_token_logprobs"), clean.valid_mask.unsqueeze(-1))
    dirty = map_tensors(clean, lambda n, value: torch.where(counts[n], value, junk) if n in counts else value)
    weights_equal(sample_weights(rule, dirty), sample_weights(rule, clean))


@pytest.mark.parametrize("name", ["jepo", "jepo_single", "verifree", "jepo_rl"])
def test_adding_a_constant_to_every_log_prob_changes_no_weight(name):
    """verifree too: scaled by the largest likelihood of the batch, it reads only differences."""
    rule = replace(PAPER, name=name)
    moved = sample_weights(rule, batch(level=-1e4))
    weights_equal(moved, sample_weights(rule, batch(level=-20.0)), tolerance=1e-8)
    assert moved.policy_weight.abs().max() > 1e-3


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_failed_sample_counts_nowhere(name):
    """Removing it from the batch changes no other sample's coefficients."""
    kept = map_tensors(batch(), lambda n, value: value[:1])
    failed = map_tensors(kept, lambda n, value: value.clone())
    for mask in (failed.arrived_mask, failed.valid_mask, failed.has_marker):
        mask[0, 3] = False
    without = map_tensors(kept, lambda n, value: value if "no_chain" in n else value[:, :3])
    rule = replace(PAPER, name=name)
    expected, got = sample_weights(rule, without), sample_weights(rule, failed)
    for field in ("policy_weight", "answer_weight", "kl_weight"):
        torch.testing.assert_close(getattr(got, field)[:, :3], getattr(expected, field), rtol=1e-12, atol=1e-15)
        assert getattr(got, field)[0, 3] == 0


def test_micro_batches_sum_to_the_gradient_of_the_full_batch():
    """loss = -sum weight_t log pi(token_t) is additive: one backward over all equals one per sequence."""
    rule, scores = PAPER, batch()
    coefficients = sample_weights(rule, scores)
    logits = torch.randn(28, 12, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    losses = []
    for n in range(28):
        p, i = divmod(n, 4)
        chain, answer = int(scores.chain_length[p, i]), int(scores.answer_length[p, i] * scores.valid_mask[p, i])
        logprobs = logits[n].log_softmax(-1)[: chain + answer, 0]
        sequence = SequenceLogprobs(
            chain_length=chain,
            answer_length=answer,
            policy_logprobs=logprobs,
            reference_logprobs=torch.full_like(logprobs, -1.0),
        )
        entries = [getattr(coefficients, f)[p, i].item() for f in ("policy_weight", "answer_weight", "kl_weight")]
        losses.append(-(sequence_weights(rule, sequence, *entries) * logprobs).sum())
    (full,) = torch.autograd.grad(torch.stack(losses).sum(), logits, retain_graph=True)
    parts = [torch.stack(losses[begin:end]).sum() for begin, end in ((0, 5), (5, 6), (6, 28))]
    summed = sum(torch.autograd.grad(part, logits, retain_graph=True)[0] for part in parts)
    torch.testing.assert_close(summed, full)
    assert full.abs().max() > 0
