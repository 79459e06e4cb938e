"""A fault of the verifier is never better than a wrong answer: as if the sample were not there, where answers train."""

from dataclasses import replace

import pytest
import torch

from nemo_jepo.metrics import update_metrics
from nemo_jepo.objective import sample_weights
from nemo_jepo.objective.records import GroupScores
from nemo_jepo.objective.tables import group_scores
from nemo_jepo.types import Scores, Spliced, SplicedBatch
from tests.unit.objective.batches import PAPER
from tests.unit.objective.tabular import PLAIN

FAULTED = 2
"""The sample of the first prompt whose verifier faults."""
REWARDS = [[1.0, 0.0, None, 0.0], [0.0, 1.0, 1.0, 0.0]]
RULES = {
    "the paper's": PAPER,
    "plain": replace(PLAIN, format_loss="paper", format_weight=0.7, kl_beta=0.1),
    "by group, a sum": replace(PAPER, std_scope="group", rl_reduction="sum"),
    "per token": replace(PAPER, reward_normalization="answer_tokens", loss_normalization="chain"),
    "KL in the reward": replace(PLAIN, kl_beta=0.1, kl_estimator="k1_reward"),
    "over valid prompts": replace(PAPER, prompt_mean="valid"),
}


def sequence(group: int, sample: int, own_answer: bool) -> Spliced:
    """Of 2 to 5 chain tokens and 2 answer tokens; the last sample of a group has no marker."""
    chain, marker = 2 + sample, sample != 3
    answer = 2 if marker else 0
    return Spliced(
        group=group,
        sample=sample,
        token_ids=(1,) * (1 + chain + answer),
        prompt_length=1,
        chain_length=chain,
        answer_length=answer,
        valid=marker,
        has_marker=marker,
        own_answer=own_answer,
        generation_logprobs=(-1.0,) * (chain + (answer if own_answer else 0)),
    )


def tables(
    samples: list[list[int]], own_answers: bool = True, rewards: list[list[float | None]] = REWARDS
) -> GroupScores:
    """Tables of both prompts, of their samples with these numbers."""
    sequences = [sequence(group, sample, own_answers) for group, them in enumerate(samples) for sample in them]

    def scores(step: float) -> Scores:
        return Scores(tuple(-step * (1 + one.group + one.sample + torch.arange(one.length - 1)) for one in sequences))

    of_samples = [rewards[one.group][one.sample] for one in sequences]
    batch = SplicedBatch(sequences=sequences, group_size=len(samples[0]), rewards=of_samples)
    return group_scores(batch, scores(0.3), scores(0.5))


@pytest.mark.parametrize("name", ["rloo", "jepo_rl"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_a_faulted_sample_has_no_weight_and_changes_none(name, rule):
    """The other samples have what they have in a group without it; in the second prompt the same sample has failed."""
    rule = replace(rule, name=name)
    whole = tables([[0, 1, FAULTED, 3], [0, 1, 2, 3]])
    without = tables([[0, 1, 3], [0, 1, 3]])
    whole.arrived_mask[1, 2] = whole.valid_mask[1, 2] = False
    with_fault, expected = sample_weights(rule, whole), sample_weights(rule, without)
    for field in ("policy_weight", "answer_weight", "kl_weight", "advantage"):
        found = getattr(with_fault, field)
        torch.testing.assert_close(found[:, [0, 1, 3]], getattr(expected, field), msg=lambda m, f=field: f"{f}: {m}")
        assert (found[0, FAULTED] == 0).all()
    torch.testing.assert_close(with_fault.advantage_std, expected.advantage_std)
    assert with_fault.policy_weight.abs().max() > 1e-3


def test_a_fault_in_a_prompt_that_no_sample_solved_counts_as_a_wrong_answer():
    """jepo_rl: the reference answer's likelihood scores all of them, so whether the own answer is right is not read."""
    wrong = [[0.0] * 4, [0.0] * 4]
    faulted = [[0.0, 0.0, None, 0.0], [0.0] * 4]
    rule, samples = replace(PAPER, name="jepo_rl"), [[0, 1, 2, 3]] * 2
    found = sample_weights(rule, tables(samples, own_answers=False, rewards=faulted))
    expected = sample_weights(rule, tables(samples, own_answers=False, rewards=wrong))
    for field in ("policy_weight", "answer_weight", "kl_weight", "advantage", "advantage_std"):
        torch.testing.assert_close(getattr(found, field), getattr(expected, field), rtol=0, atol=0)


def test_a_prompt_of_faults_alone_is_in_no_denominator():
    rule = replace(PAPER, name="rloo")
    lost = tables([[0, 1, 2, 3]] * 2, rewards=[[None] * 4, REWARDS[1]])
    found = sample_weights(rule, lost)
    alone = sample_weights(rule, tables([[0, 1, 2, 3]], rewards=[REWARDS[1]]))
    assert (found.policy_weight[0] == 0).all() and (found.kl_weight[0] == 0).all()
    torch.testing.assert_close(found.kl_weight[1], alone.kl_weight[0])


def test_the_reward_is_the_mean_over_verdicts_and_faults_are_counted_apart():
    """3 of 7 verdicts are 1, and 1 of 8 answers has none; all 8 samples arrived."""
    rule, scores = replace(PAPER, name="rloo"), tables([[0, 1, 2, 3]] * 2)
    metrics = update_metrics(rule, scores, sample_weights(rule, scores))
    assert metrics["reward"] == (3.0, 7.0)
    assert metrics["verifier_fault_rate"] == (1.0, 8.0)
    assert metrics["arrived_rate"] == (8.0, 8.0)
