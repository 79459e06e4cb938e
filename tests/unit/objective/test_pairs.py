"""DPO: which samples are compared, and the gradient of the comparison against autograd."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nemo_jepo.objective import GroupScores, SequenceLogprobs, UpdateRule, sample_weights
from nemo_jepo.objective.pairs import compare, preference_weight
from nemo_jepo.objective.update import sequence_weights, verifiable_prompts
from tests.unit.objective.batches import batch, map_tensors
from tests.unit.objective.tabular import PLAIN

DPO = replace(PLAIN, name="dpo", beta_sup=0.0, format_loss="none", kl_beta=0.0, pair_beta=0.3)
NAN, ALL, SECOND_IS_UNMARKED = math.nan, (True, True, True, True), (True, False, True, True)


def group(
    logprob=(-1.0, -2.0, -3.0, -4.0),
    reward=(0.0, 0.0, 0.0, 0.0),
    valid=ALL,
    marker=ALL,
    arrived=ALL,
    chain=(5, 5, 5, 5),
) -> GroupScores:
    """One prompt with four samples."""

    def table(values, dtype) -> Tensor:
        return torch.tensor([values], dtype=dtype)

    return GroupScores(
        answer_logprob=table(logprob, torch.float64),
        valid_mask=table(valid, torch.bool),
        arrived_mask=table(arrived, torch.bool),
        has_marker=table(marker, torch.bool),
        chain_length=table(chain, torch.int64),
        answer_length=table((2, 2, 2, 2), torch.int64),
        chain_log_ratio=torch.zeros(1, 4, dtype=torch.float64),
        verifiable_reward=table(reward, torch.float64),
    )


def pair_of(scores: GroupScores, **changes) -> tuple[int, int] | None:
    rule = replace(DPO, **changes)
    pairs = compare(rule, scores, verifiable_prompts(rule, scores))
    return (pairs.chosen.item(), pairs.rejected.item()) if pairs.has_pair.item() else None


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ({"reward": (0.0, 1.0, 0.0, 1.0)}, (1, 0)),  # the first right one over the first wrong one
        ({"reward": (1.0, 1.0, 1.0, 0.0)}, (0, 3)),
        ({"reward": ALL}, None),  # nothing is wrong
        ({"reward": (NAN, 1.0, NAN, 0.0)}, (1, 3)),  # a fault is neither
        ({"reward": (NAN, 1.0, NAN, NAN)}, None),
        ({"reward": (1.0, 0.0, 0.0, 0.0), "arrived": (True, False, True, True)}, (0, 2)),
        # without the marker there is no own answer, and that is wrong
        (
            {"reward": (0.0, 0.0, 1.0, 1.0), "valid": (True, False, True, True), "marker": (True, False, True, True)},
            (2, 0),
        ),
        (
            {"reward": (1.0, 0.0, 1.0, 1.0), "valid": (True, False, True, True), "marker": (True, False, True, True)},
            (0, 1),
        ),
    ],
)
def test_where_a_verifier_rewards_a_sample_the_first_right_one_is_chosen_over_the_first_wrong_one(case, expected):
    assert pair_of(group(**case)) == expected


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ({"logprob": (-3.0, -1.0, -9.0, -2.0)}, (1, 2)),
        ({"logprob": (-3.0, -1.0, -3.0, -1.0)}, (1, 0)),  # of equal ones the first
        ({"logprob": (-2.0, -2.0, -2.0, -2.0)}, None),
        ({"valid": (True, False, False, False), "marker": (True, False, False, False)}, (0, 1)),  # likelihood 0
        ({"valid": (True, True, False, False), "marker": (True, True, False, True)}, (0, 2)),
        ({"valid": (True, False, False, False), "marker": ALL}, None),  # a marker that ends inside a token says nothing
        ({"valid": (False,) * 4, "marker": (False,) * 4}, None),
        ({"arrived": (True, False, False, False), "valid": (True, False, False, False)}, None),
        ({"logprob": (-1.0, NAN, -3.0, NAN), "valid": (True, False, True, False), "marker": ALL}, (0, 2)),
    ],
)
def test_elsewhere_the_likelihood_of_the_reference_answer_chooses(case, expected):
    assert pair_of(group(**case)) == expected


def test_every_table_of_scores_has_the_pair_that_they_say():
    """Highest over lowest of what has a score, the first where several are; 4 samples, each of 5 kinds."""
    kinds = {"fault": NAN, "unmarked": 0.0, "low": 0.0, "middle": 0.45, "high": 1.0}
    for samples in itertools.product(kinds, repeat=4):
        marked = tuple(kind != "unmarked" for kind in samples)
        arrived = tuple(kind != "fault" for kind in samples)  # as tables.group_scores has it
        valid = tuple(a and m for a, m in zip(arrived, marked, strict=True))
        reward = tuple(kinds[kind] for kind in samples)
        found = pair_of(
            group(reward=reward, valid=valid, marker=marked, arrived=arrived, logprob=(NAN,) * 4), unverifiable="score"
        )
        known = [i for i in range(4) if arrived[i]]
        best = max((i for i in known if valid[i]), key=lambda i: (reward[i], -i), default=None)
        worst = min(known, key=lambda i: (reward[i], i), default=None)
        expected = None if best is None or reward[best] == reward[worst] else (best, worst)
        assert found == expected, samples


def test_by_score_the_longest_of_the_worse_samples_may_be_rejected():
    scores = group(reward=(0.9, 0.5, 0.1, NAN), chain=(9, 8, 3, 30), arrived=(True, True, True, False))
    assert pair_of(scores, unverifiable="score") == (0, 2)
    assert pair_of(scores, unverifiable="score", reject_longest=True) == (0, 1)


def test_the_longest_of_the_worse_samples_may_be_rejected_and_own_answers_count_in_its_length():
    likely = group(chain=(9, 3, 8, 4))
    assert pair_of(likely, reject_longest=True) == (0, 2)
    right = group(reward=(0.0, 1.0, 0.0, 1.0), chain=(4, 9, 5, 20), valid=(True, True, False, True))
    assert pair_of(right, reject_longest=True) == (1, 0)  # 4 + 2 over 5, whose answer is not there
    assert pair_of(right) == (1, 0)


# ---- the gradient ----------------------------------------------------------------------------------------------------


def scored(
    seed: int, has_reference: bool = True, rule: UpdateRule = DPO
) -> tuple[GroupScores, list[list[Tensor]], list[list[Tensor]]]:
    """A random batch whose log-ratios are those of random token log-probs, and these: policy's and reference's."""
    scores, generator = batch(seed), torch.Generator().manual_seed(seed)
    own = verifiable_prompts(rule, scores) & scores.valid_mask

    def tokens() -> list[list[Tensor]]:
        return [
            [-torch.rand(int(c + a), generator=generator, dtype=torch.float64) for c, a in zip(*row, strict=True)]
            for row in zip(scores.chain_length.tolist(), scores.answer_length.tolist(), strict=True)
        ]

    policy, reference = tokens(), tokens()
    ratio, own_ratio = torch.zeros_like(scores.answer_logprob), torch.zeros_like(scores.answer_logprob)
    for p, lengths in enumerate(scores.chain_length.tolist()):
        for i, length in enumerate(lengths):
            difference = policy[p][i] - reference[p][i]
            ratio[p, i] = difference[:length].sum()
            own_ratio[p, i] = difference[length:].sum() if own[p, i] else 0.0
            policy[p][i].requires_grad_()
    if not has_reference:
        return replace(scores, chain_log_ratio=torch.zeros_like(ratio), own_answer_log_ratio=None), policy, policy
    return replace(scores, chain_log_ratio=ratio, own_answer_log_ratio=own_ratio), policy, reference


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("prompt_mean", ["all", "valid"])
@pytest.mark.parametrize("has_reference", [True, False])
@pytest.mark.parametrize("unverifiable", ["likelihood", "score"])
def test_token_weights_are_the_gradient_of_the_loss(seed, prompt_mean, has_reference, unverifiable):
    """-1/P sum log sigmoid(beta (log-ratio of the chosen - that of the rejected)), differentiated by autograd."""
    rule = replace(DPO, prompt_mean=prompt_mean, unverifiable=unverifiable)
    scores, policy, reference = scored(seed, has_reference, rule)
    verifiable = verifiable_prompts(rule, scores)
    pairs = compare(rule, scores, verifiable)
    assert pairs.has_pair.any() and not pairs.has_pair.all()
    losses = []
    for p in pairs.has_pair.nonzero().flatten().tolist():
        ratios = []
        for i in (pairs.chosen[p].item(), pairs.rejected[p].item()):
            own = bool(verifiable[p]) and bool(scores.valid_mask[p, i])
            end = scores.chain_length[p, i] + (scores.answer_length[p, i] if own else 0)
            ratios.append((policy[p][i] - reference[p][i].detach())[:end].sum())
        losses.append(-torch.nn.functional.logsigmoid(rule.pair_beta * (ratios[0] - ratios[1])))
    count = scores.arrived_mask.any(-1).sum() if prompt_mean == "all" else pairs.has_pair.sum()
    (torch.stack(losses).sum() / count).backward()

    weights = sample_weights(rule, scores)
    assert (weights.answer_weight == 0).all() and (weights.kl_weight == 0).all() and (weights.end_weight == 0).all()
    for p, row in enumerate(policy):
        for i, tokens in enumerate(row):
            own = bool(verifiable[p]) and bool(scores.valid_mask[p, i])
            sequence = SequenceLogprobs(
                chain_length=scores.chain_length[p, i].item(),
                answer_length=scores.answer_length[p, i].item(),
                own_answer=own,
                policy_logprobs=tokens.detach(),
            )
            entries = [
                table[p, i].item() for table in (weights.policy_weight, weights.answer_weight, weights.kl_weight)
            ]
            expected = torch.zeros_like(tokens) if tokens.grad is None else -tokens.grad
            found = sequence_weights(rule, sequence, *entries).double()
            torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-8)


def test_without_a_reference_policy_the_policy_is_its_own_and_every_pair_has_half_of_beta():
    scores, _, _ = scored(0, has_reference=False)
    found = sample_weights(DPO, scores).policy_weight * scores.arrived_mask.any(-1).sum()
    of_pairs = found.abs()[found != 0]
    assert len(of_pairs) > 2
    torch.testing.assert_close(of_pairs, torch.full_like(of_pairs, 0.15))


def test_what_is_no_member_of_a_pair_changes_nothing():
    scores, _, _ = scored(1)
    pairs = compare(DPO, scores, verifiable_prompts(DPO, scores))
    outside = torch.ones_like(scores.valid_mask)
    outside.scatter_(-1, pairs.chosen.unsqueeze(-1), False).scatter_(-1, pairs.rejected.unsqueeze(-1), False)
    outside |= ~pairs.has_pair.unsqueeze(-1)
    ratios = {"chain_log_ratio", "own_answer_log_ratio"}
    spoilt = map_tensors(scores, lambda name, value: torch.where(outside, NAN, value) if name in ratios else value)
    assert torch.equal(sample_weights(DPO, spoilt).policy_weight, sample_weights(DPO, scores).policy_weight)


def test_a_pair_that_is_told_apart_has_little_weight_and_one_the_wrong_way_round_all_of_beta():
    found = preference_weight(0.1, torch.tensor([0.0, 1000.0, -1000.0], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([0.05, 0.0, 0.1], dtype=torch.float64))


def test_a_likelihood_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="valid sample 1 of group 0"):
        sample_weights(DPO, group(logprob=(-1.0, NAN, -2.0, -3.0)))
