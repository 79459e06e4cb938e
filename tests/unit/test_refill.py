"""Dynamic sampling: who stays, who takes a place, what is counted, and that every rank does the same."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from nemo_jepo.config.schema import RefillConfig
from nemo_jepo.data.packing import RowShape
from nemo_jepo.objective import group_scores
from nemo_jepo.objective.records import Scored
from nemo_jepo.objective.update import reward_spread
from nemo_jepo.refill import Refill, Sampled
from nemo_jepo.types import Prompt, Rollout, Scores, Spliced, SplicedBatch
from tests.support.one_rank import OneRank
from tests.unit.objective.batches import batch, rule_of

SETTINGS = RefillConfig(max_batches=3, ratio=0.5, exponential_mean=0.5, statistics_from=1, first_step=2)


class Actor:
    row_shape = RowShape(64)


def sampled(first_id: int, spreads: Sequence[float], no_chain: bool = False) -> Sampled:
    """One prompt for every spread: two samples whose answers of one token have log-probs -3 -+ spread."""
    prompts = [Prompt(first_id + place, (first_id + place, 1), "q", "a") for place in range(len(spreads))]
    sequences, rollouts, logprobs = [], [], []
    for group, spread in enumerate(spreads):
        for sample, sign in enumerate((-1, 1)):
            prompt = prompts[group].token_ids
            sequences.append(
                Spliced(
                    group, sample, (*prompt, 5, 7), 2, 1, 1, valid=True, has_marker=True, generation_logprobs=(-1.0,)
                )
            )
            rollouts.append(Rollout(group, sample, (5,), (-1.0,), "stop"))
            logprobs.append(torch.tensor([-1.0, -3 + sign * spread]))
    behind = [
        Spliced(group, 0, (*prompts[group].token_ids, 6, 7), 2, 1, 1, True, True) for group in range(len(spreads))
    ]
    logprobs += [torch.tensor([-1.0, -float(prompt.prompt_id)]) for prompt in prompts if no_chain]
    spliced = SplicedBatch(sequences=sequences, group_size=2, no_chain=behind if no_chain else None)
    scores = Scores(tuple(logprobs))
    scored = Scored(batch=spliced, rows=(), policy=scores, reference=None, groups=group_scores(spliced, scores))
    return Sampled(prompts, rollouts, scored)


def fill(refill: Refill, step: int, batches: Sequence[Sampled], layout: OneRank | None = None) -> Sampled:
    rule = rule_of("jepo_single")
    return refill.fill(
        batches[0], batches.__getitem__, lambda s: reward_spread(rule, s), Actor(), layout or OneRank(), step
    )


def ids(found: Sampled) -> list[int]:
    return [prompt.prompt_id for prompt in found.prompts]


def test_prompts_whose_samples_are_alike_give_way_to_those_of_the_next_batches():
    """S = 1: of the first batch 0.4 and 0 go, and 2 and 0.6 stay; the next gives one, the third the last."""
    refill = Refill(SETTINGS, mean_spread=1.0, num_statistics=100)
    refill.settings = replace(SETTINGS, statistics_from=99)
    batches = [sampled(0, [2.0, 0.4, 0.0, 0.6]), sampled(10, [0.1, 0.1, 3.0, 0.1]), sampled(20, [9.0, 9.0, 9.0, 9.0])]
    found = fill(refill, 5, batches)
    assert ids(found) == [0, 3, 12, 20]
    assert (refill.num_batches, refill.metrics()["filtered_rate"]) == (3, (8.0, 12.0))
    assert refill.metrics()["refill_rounds"] == (2.0, 1.0)


def test_what_stays_is_numbered_and_packed_anew_with_its_own_scores():
    refill = Refill(replace(SETTINGS, statistics_from=99), mean_spread=1.0)
    found = fill(refill, 5, [sampled(0, [2.0, 0.4], no_chain=True), sampled(10, [3.0, 4.0], no_chain=True)])
    assert ids(found) == [0, 10]
    assert [(s.group, s.sample) for s in found.scored.sequences] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [s.token_ids[0] for s in found.scored.sequences] == [0, 0, 10, 10]
    assert [(r.group, r.sample) for r in found.rollouts] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert found.scored.groups.answer_logprob.tolist() == [[-5.0, -1.0], [-6.0, 0.0]]
    assert found.scored.groups.no_chain_logprobs.tolist() == [[0.0], [-10.0]]
    assert [one.group for one in found.scored.batch.no_chain] == [0, 1]
    held = torch.cat([row.sequence_index[row.scored_mask] for row in found.scored.rows])
    assert sorted(held.unique().tolist()) == [0, 1, 2, 3, 4, 5]


def test_a_full_batch_draws_no_other():
    refill = Refill(replace(SETTINGS, statistics_from=99), mean_spread=1.0)
    assert ids(fill(refill, 5, [sampled(0, [2.0, 1.0])])) == [0, 1]
    assert refill.num_batches == 1


def test_a_step_goes_on_smaller_when_its_batches_are_used_up():
    refill = Refill(SETTINGS, mean_spread=1.0)
    found = fill(refill, 5, [sampled(10 * k, [0.0, 0.0]) for k in range(3)])
    assert (ids(found), found.scored.rows, refill.num_batches) == ([], [], 3)
    assert found.scored.groups.answer_logprob.shape == (0, 2)


def test_places_go_in_the_order_of_the_global_batch():
    """The second of two replicas: of four places 1 + 1 go to the first batch; the other replica takes the last 2."""
    refill = Refill(replace(SETTINGS, statistics_from=99), mean_spread=1.0)
    of_first = iter([0.0, 1.0, 2.0])  # statistics, then what the other replica keeps of each batch
    layout = OneRank(
        data_parallel_rank=1,
        data_parallel_size=2,
        sum_over_data_parallel=lambda t: t + torch.tensor([next(of_first), 0.0], dtype=t.dtype),
    )
    batches = [sampled(0, [0.1, 2.0]), sampled(10, [2.0, 2.0])]
    found = fill(refill, 5, batches, layout)  # room 4: 1 + 1, then 2 of the other's
    assert ids(found) == [1] and refill.num_batches == 2


def test_statistics_are_of_the_first_batch_and_come_before_dropping():
    """Spreads 1 and 3, then 4 and 0: S = 2, then 2 + (2 - 2)/2; nothing is dropped in step 1."""
    refill = Refill(SETTINGS)
    assert ids(fill(refill, 0, [sampled(0, [1.0, 3.0])])) == [0, 1]
    assert refill.mean_spread == pytest.approx(2.0)
    assert ids(fill(refill, 1, [sampled(0, [4.0, 0.0]), sampled(10, [9.0, 9.0])])) == [0, 10]
    assert refill.mean_spread == pytest.approx(2.0)
    fill(refill, 2, [sampled(0, [4.0, 8.0])])
    assert refill.mean_spread == pytest.approx(4.0)


def test_the_first_statistics_are_their_plain_mean():
    """With 0.99 a start from 0 would take hundreds of steps: 1, 3, 5 give 1, 2, 3."""
    refill = Refill(replace(SETTINGS, exponential_mean=0.99, first_step=99))
    means = []
    for step, spread in enumerate((1.0, 3.0, 5.0)):
        fill(refill, step, [sampled(0, [spread])])
        means.append(refill.mean_spread)
    assert means == pytest.approx([1.0, 2.0, 3.0])


def test_a_resumed_run_goes_on_with_its_statistics():
    refill, resumed = Refill(SETTINGS), Refill(SETTINGS)
    fill(refill, 0, [sampled(0, [1.0, 3.0])])
    resumed.load_state_dict(refill.state_dict())
    for one in (refill, resumed):
        fill(one, 1, [sampled(0, [4.0, 0.0]), sampled(10, [9.0, 9.0])])
    assert resumed.state_dict() == refill.state_dict()


def test_the_spread_is_that_of_the_raw_reward_over_valid_samples():
    """By likelihood, or by the verifier where it scores the prompt; 0 with fewer than two valid samples."""
    scores = batch()
    for name, value in (("jepo", scores.answer_logprob), ("rloo", scores.verifiable_reward)):
        found = reward_spread(rule_of(name), scores)
        for group, valid in enumerate(scores.valid_mask):
            values = value[group][valid]
            wanted = values.std(correction=0) if len(values) > 1 else torch.tensor(0.0)
            assert found[group].item() == pytest.approx(float(wanted), abs=1e-9)
