"""From one sample's coefficients to the weight of each of its tokens."""

import math
from dataclasses import replace

import pytest
import torch

from nemo_jepo.objective import SequenceLogprobs
from nemo_jepo.objective.kl import KL_GRADIENTS
from nemo_jepo.objective.update import sequence_weights
from tests.unit.objective.batches import PAPER
from tests.unit.objective.tabular import PLAIN


def sequence(**overrides) -> SequenceLogprobs:
    given = {
        "chain_length": 3,
        "answer_length": 2,
        "policy_logprobs": torch.tensor([-1.0, -2.0, -0.5, -3.0, -4.0]),
        "reference_logprobs": torch.tensor([-1.5, -1.0, -0.5, -9.0, -9.0]),
        "generation_logprobs": torch.tensor([-1.0, -2.0, -0.5]) - math.log(1.5),
    }
    return SequenceLogprobs(**(given | overrides))


def test_policy_weight_falls_on_the_chain_and_answer_weight_on_the_answer():
    weights = sequence_weights(PLAIN, sequence(), 0.25, 0.125, 0.0)
    assert weights.tolist() == [0.25, 0.25, 0.25, 0.125, 0.125]
    assert weights.dtype == torch.float32 and not weights.requires_grad


def test_the_end_of_turn_has_its_weight_beside_the_answers():
    assert sequence_weights(PLAIN, sequence(), 0.25, 0.125, 0.0, 0.5).tolist() == [0.25, 0.25, 0.25, 0.125, 0.625]


def test_own_answers_carry_the_policy_weight_too():
    assert sequence_weights(PLAIN, sequence(own_answer=True), 0.25, 0.125, 0.0).tolist() == [0.25] * 5


def test_kl_falls_on_the_chain_alone_and_pulls_towards_the_reference_policy():
    """r = 0.5, -1, 0: more likely than in the reference policy is pushed down."""
    assert sequence_weights(PLAIN, sequence(), 0.0, 0.0, 2.0).tolist() == [-1.0, 2.0, 0.0, 0.0, 0.0]
    rule = replace(PLAIN, kl_estimator="k2_sequence")
    assert sequence_weights(rule, sequence(own_answer=True), 0.0, 0.0, 2.0).tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("estimator", KL_GRADIENTS)
@pytest.mark.parametrize("log_ratio", [120.0, -120.0, 1e4, -1e4])
def test_no_log_ratio_gives_a_weight_that_is_not_finite(estimator, log_ratio):
    """As float32, which is what goes backward; a ratio of exp(120) is 1.3e52. The pull keeps its direction."""
    reference = torch.full((5,), -1.0) - log_ratio
    given = sequence(policy_logprobs=torch.full((5,), -1.0), reference_logprobs=reference)
    weights = sequence_weights(replace(PLAIN, kl_estimator=estimator), given, 0.0, 0.0, 1e-3)
    assert weights.dtype == torch.float32 and torch.isfinite(weights).all()
    assert (weights[:3].sign() == (0 if estimator == "k1_reward" else -math.copysign(1, log_ratio))).all()


def test_importance_sampling_multiplies_the_policy_gradient_alone():
    """A ratio of 1.5 per token, 1.5^3 = 3.375 capped at 2 per sequence; answer and KL weights are untouched."""
    for kind, ratio in (("token_truncated", 1.5), ("sequence_truncated", 2.0)):
        weights = sequence_weights(replace(PLAIN, importance_sampling=kind), sequence(), 1.0, 0.125, 2.0)
        expected = torch.tensor([ratio - 1.0, ratio + 2.0, ratio, 0.125, 0.125])
        torch.testing.assert_close(weights, expected)


def test_every_answer_token_of_a_sample_has_the_same_weight():
    """The misprint sum_t pi(a*_t) would weigh likely tokens more; the log of the product weighs all alike."""
    weights = sequence_weights(PAPER, sequence(), 0.1, 0.3, 1e-3)[3:]
    assert torch.equal(weights, torch.full((2,), 0.3))


@pytest.mark.parametrize(
    ("rule", "overrides", "name"),
    [
        (PLAIN, {"reference_logprobs": None}, "reference_logprobs"),
        (PLAIN, {"reference_logprobs": torch.zeros(3)}, "reference_logprobs"),
        (PLAIN, {"policy_logprobs": torch.zeros(4)}, "policy_logprobs"),
        (replace(PLAIN, importance_sampling="token_truncated"), {"generation_logprobs": None}, "generation_logprobs"),
        (replace(PLAIN, importance_sampling="token_truncated"), {"own_answer": True}, "generation_logprobs"),
    ],
)
def test_log_probs_that_the_rule_reads_must_be_there_and_fit(rule, overrides, name):
    with pytest.raises(ValueError, match=f"^{name}:"):
        sequence_weights(rule, sequence(**overrides), 1.0, 1.0, 1.0)


def test_an_empty_sequence_has_no_weights():
    nothing = torch.zeros(0)
    empty = sequence(chain_length=0, answer_length=0, policy_logprobs=nothing, reference_logprobs=nothing)
    assert sequence_weights(PLAIN, empty, 1.0, 1.0, 1.0).shape == (0,)
