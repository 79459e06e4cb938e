"""The forms of the format loss: what each one's gradient is, and what it leaves alone."""

from dataclasses import replace

import pytest
import torch

from nemo_jepo.config.compose import compose, resolve
from nemo_jepo.config.objectives import FORMAT_LOSSES
from nemo_jepo.objective import sample_weights
from nemo_jepo.objective.format import FORMAT_TERMS
from nemo_jepo.setup import update_rule
from tests.unit.objective.batches import PAPER, SCORING, batch, weights_equal
from tests.unit.objective.tabular import (
    CHAINS,
    MARKER,
    PLAIN,
    REFERENCE_ANSWER,
    TabularPolicy,
    expected_update,
    marked_samples,
    own_answer_samples,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
CHAIN_PARAMETERS = 3 + 2 * 3


@pytest.fixture
def policy() -> TabularPolicy:
    return TabularPolicy(seed=7)


def test_the_functions_are_those_of_the_setting():
    assert tuple(FORMAT_TERMS) == FORMAT_LOSSES


def test_paper_follows_the_exact_gradient_of_the_format_reward(policy):
    """grad of -p * P(no marker): acting on c_i when valid and on all of y_i when not loses nothing."""
    missing = torch.stack([policy.chain_logprobs(c).sum().exp() for c in CHAINS if MARKER not in c]).sum()
    rule = replace(PLAIN, name="jepo_single", beta_sup=0.0, format_loss="paper")
    likelihood_only = expected_update(replace(rule, format_loss="none"), marked_samples(policy), 2)
    update = expected_update(rule, marked_samples(policy), 2) - likelihood_only
    torch.testing.assert_close(update, policy.gradient(-10.0 * missing), **CLOSE)


def test_tokens_after_the_marker_add_nothing_to_the_format_gradient(policy):
    """Own answers carry the format reward too (rloo): its mean over them is zero."""
    samples = [s for s in own_answer_samples(policy) if MARKER in s.chain]
    samples += [s for s in marked_samples(policy) if MARKER not in s.chain]
    missing = torch.stack([policy.chain_logprobs(c).sum().exp() for c in CHAINS if MARKER not in c]).sum()
    rule = replace(PLAIN, name="rloo", format_loss="paper")
    update = expected_update(rule, samples, 2) - expected_update(replace(rule, format_loss="none"), samples, 2)
    torch.testing.assert_close(update, policy.gradient(-10.0 * missing), **CLOSE)


def test_the_end_of_turn_follows_its_exact_gradient_behind_chains_and_answers_that_are_held_fixed(policy):
    """grad of sum_c P(c) log pi(e | c, a*) over chains with the marker, P held fixed; e is a*'s last token here."""
    chains = [chain for chain in CHAINS if MARKER in chain]
    held = [policy.chain_logprobs(chain).sum().exp().detach() for chain in chains]
    exact = sum(p * policy.answer_logprobs(chain, REFERENCE_ANSWER)[-1] for p, chain in zip(held, chains, strict=True))
    rule = replace(PLAIN, name="jepo_single", beta_sup=0.0, format_loss="marker_and_end", format_weight=0.25)
    reward_alone = expected_update(replace(rule, format_loss="paper"), marked_samples(policy), 2)
    update = expected_update(rule, marked_samples(policy), 2) - reward_alone
    torch.testing.assert_close(update, policy.gradient(0.25 * exact), **CLOSE)
    assert (update[:CHAIN_PARAMETERS] == 0).all() and update.abs().max() > 0.01


@pytest.mark.parametrize("name", SCORING)
@pytest.mark.parametrize("prompt_mean", ["all", "valid"])
@pytest.mark.parametrize("loss_normalization", ["none", "chain", "sequence", "batch"])
def test_the_end_of_turn_has_its_weight_over_n_and_prompts_and_all_else_is_the_papers(
    name, prompt_mean, loss_normalization
):
    """1/(n P) with P of prompts that arrived, whatever the mean of the other terms is: it is one token, and no l_i."""
    changes = {"prompt_mean": prompt_mean, "loss_normalization": loss_normalization, "format_weight": 0.5}
    rule, scores = replace(PAPER, name=name, **changes), batch()
    found, paper = (sample_weights(replace(rule, format_loss=form), scores) for form in ("marker_and_end", "paper"))
    arrived = scores.arrived_mask.sum(-1, keepdim=True).clamp(min=1)
    expected = 0.5 * scores.ends_mask.double() / arrived / scores.arrived_mask.any(-1).sum()
    assert scores.ends_mask.any() and (scores.valid_mask & ~scores.ends_mask).any()
    torch.testing.assert_close(found.end_weight, expected)
    weights_equal(replace(found, end_weight=paper.end_weight), paper)
    assert (paper.end_weight == 0).all()


def test_an_end_of_turn_that_did_not_arrive_and_a_table_without_any_have_no_weight():
    scores = batch()
    lost = replace(scores, ends_mask=torch.ones_like(scores.arrived_mask))
    rule = replace(PLAIN, name="jepo_single", beta_sup=0.0, format_loss="marker_and_end")
    assert (sample_weights(rule, lost).end_weight[~scores.arrived_mask] == 0).all()
    assert (sample_weights(rule, replace(scores, ends_mask=None)).end_weight == 0).all()


def test_paper_counts_only_arrived_samples():
    """Rewards 0, -10, 0 of three arrived: 0 - (-5), -10 - 0, 0 - (-5); the failed one is nobody's baseline."""
    has_marker = torch.tensor([[True, False, True, False]])
    arrived = torch.tensor([[True, True, True, False]])
    for form in ("paper", "marker_and_end"):
        advantage, end_weight = FORMAT_TERMS[form](has_marker, arrived, torch.ones_like(arrived))
        torch.testing.assert_close(advantage, torch.tensor([[5.0, -10.0, 5.0, 0.0]], dtype=torch.float64))
        assert end_weight.tolist() == [[0.0] * 4 if form == "paper" else [1.0, 1.0, 1.0, 0.0]]


def test_the_weight_of_the_papers_form_acts_behind_scale_and_clip():
    """Twice the weight is twice the term, which twice the penalty is not: that is divided out."""
    once, twice, none = (
        sample_weights(replace(PAPER, format_weight=weight), batch()).policy_weight for weight in (1.0, 2.0, 0.0)
    )
    torch.testing.assert_close(twice - none, 2 * (once - none))
    assert torch.equal(none, sample_weights(replace(PAPER, format_loss="none"), batch()).policy_weight)


@pytest.mark.parametrize("form", FORMAT_LOSSES)
def test_a_batch_in_which_all_or_no_sample_has_the_marker_has_no_format_signal(form):
    """Equal rewards have no advantage. Without a valid sample no turn ends behind a reference answer either."""
    for has_marker in (True, False):
        scores = batch()
        scores.has_marker[:], scores.valid_mask[:], scores.ends_mask[:] = has_marker, False, False
        found = sample_weights(replace(PAPER, format_loss=form), scores)
        assert not any((table != 0).any() for table in (found.policy_weight, found.answer_weight, found.end_weight))


def test_objective_jepo_paper_is_appendix_b2():
    """The rule with which test_update.py writes App. B.2 out, from the settings that a user names."""
    config = resolve(compose("jepo_tiny", ["objective=jepo_paper"]))
    assert update_rule(config.objective, config.advantage, config.kl) == PAPER


def test_the_default_is_another_form_of_the_format_loss_and_nothing_else():
    config = resolve(compose("jepo_tiny", []))
    assert update_rule(config.objective, config.advantage, config.kl) == replace(PAPER, format_loss="marker_and_end")
