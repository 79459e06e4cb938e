"""chunked_logprobs in every mode against log_softmax and autograd of whole logits in fp64."""

import math

import pytest
import torch

from nemo_jepo.actor import logprobs
from nemo_jepo.actor.logprobs import chunked_logprobs
from tests.support.logprob_modes import CHUNK, MODES, H, Mode, S, V, assert_near, chunked, draw, exact

LATER, NOW = Mode(known=False, main_grad=True), Mode(known=True, main_grad=True)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_values_and_gradients_are_those_of_the_whole_softmax(mode):
    inputs = draw()
    assert_near(chunked(mode, *inputs), exact(*inputs), 1e-12)


@pytest.mark.parametrize("mode", [LATER, NOW], ids=str)
@pytest.mark.parametrize("tokens, chunk_tokens", [(S, 1), (S, S), (S, 1000), (1, 4), (0, 4)])
def test_no_size_of_chunks_changes_them(mode, tokens, chunk_tokens):
    inputs = draw(tokens)
    assert_near(chunked(mode, *inputs, chunk_tokens), exact(*inputs), 1e-12)


@pytest.mark.parametrize("mode", [LATER, NOW], ids=str)
def test_fp32_loses_only_its_rounding(mode):
    inputs = draw(dtype=torch.float32)
    found = chunked(mode, *inputs)
    assert found["logprobs"].dtype == found["entropies"].dtype == torch.float32
    assert_near(found, exact(*inputs), 5e-6)


@pytest.mark.parametrize("mode", [LATER, NOW], ids=str)
def test_logits_of_ten_thousand_stay_finite(mode):
    inputs = draw(scale=1e4, dtype=torch.float32)
    assert (inputs[0] @ inputs[1].T).abs().max() > 1e4
    found = chunked(mode, *inputs)
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert found["logprobs"].min() < -1e4
    # fp32 spacing at 1e5 is 0.008: what the logits themselves are known to. Hidden states of 1e4 scale the weight's.
    expected = exact(*inputs)
    found["weight_grad"], expected["weight_grad"] = found["weight_grad"] / 1e4, expected["weight_grad"] / 1e4
    assert_near(found, expected, 0.03)


def test_a_certain_token_has_log_prob_and_entropy_zero():
    hidden, weight = torch.tensor([[2000.0]]), torch.tensor([[1.0], [0.0], [-1.0]])
    values, entropies = chunked_logprobs(hidden, weight, torch.tensor([0]), 0, 1)
    assert values.item() == 0.0 and entropies.item() == 0.0


def test_equal_logits_give_log_v():
    values, entropies = chunked_logprobs(torch.zeros(2, H), torch.ones(V, H), torch.tensor([0, V - 1]), 0, 1)
    torch.testing.assert_close(values, torch.full((2,), -math.log(V)))
    torch.testing.assert_close(entropies, torch.full((2,), math.log(V)))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_bf16_loses_the_rounding_of_its_factors_and_no_more(mode):
    """A vocabulary of near-equal logits: a bf16 sum of their exponentials would stop growing at 256."""
    inputs = draw(scale=0.1, dtype=torch.bfloat16)
    expected, found = exact(*inputs), chunked(mode, *inputs, chunk_tokens=1)
    assert found["logprobs"].dtype == torch.float32
    assert found["weight_grad"].dtype == torch.float32 if mode.main_grad else torch.bfloat16
    assert_near({name: found[name] for name in found if "grad" not in name}, expected, 1e-5)
    # The gradient that autograd gets is rounded once, to 2^-9 of it, however many chunks there are.
    errors = {name: (found[name].double() - expected[name]).norm() / expected[name].norm() for name in found}
    assert errors["hidden_grad"] < 2**-8
    # main_grad in fp32, whose elements are a thousand times as large here before anything is added, is not.
    assert errors["weight_grad"] < (1e-5 if mode.main_grad else 2**-8)


def test_entropies_carry_no_gradient():
    hidden, weight, target, token_weights = draw()
    for known in (None, token_weights):
        _, entropies = chunked_logprobs(hidden.requires_grad_(), weight, target, 0, CHUNK, token_weights=known)
        assert not entropies.requires_grad


@pytest.mark.parametrize("known", [False, True])
def test_a_frozen_matrix_or_frozen_hidden_states_get_no_gradient(known):
    hidden, weight, target, token_weights = draw()
    expected = exact(hidden, weight, target, token_weights)
    given = {"token_weights": token_weights if known else None, "main_grad": torch.zeros_like(weight)}

    values, _ = chunked_logprobs(hidden.requires_grad_(), weight, target, 0, CHUNK, **given)
    (-torch.dot(token_weights, values)).backward()
    torch.testing.assert_close(hidden.grad, expected["hidden_grad"])
    assert given["main_grad"].count_nonzero() == 0

    values, _ = chunked_logprobs(hidden.detach(), weight.requires_grad_(), target, 0, CHUNK, **given)
    (-torch.dot(token_weights, values)).backward()
    torch.testing.assert_close(given["main_grad"], expected["weight_grad"])


def test_without_gradients_token_weights_change_nothing():
    hidden, weight, target, token_weights = draw()
    main_grad = torch.ones_like(weight)
    with torch.no_grad():
        values, _ = chunked_logprobs(
            hidden, weight.requires_grad_(), target, 0, CHUNK, token_weights=token_weights, main_grad=main_grad
        )
    assert not values.requires_grad and (main_grad == 1).all()
    torch.testing.assert_close(values, exact(hidden, weight, target, token_weights)["logprobs"])


@pytest.mark.parametrize("loss", [lambda w, values: torch.dot(w, values), lambda w, values: -2 * torch.dot(w, values)])
def test_gradients_formed_for_another_loss_are_refused(loss):
    hidden, weight, target, token_weights = draw()
    values, _ = chunked_logprobs(hidden.requires_grad_(), weight, target, 0, CHUNK, token_weights=token_weights)
    with pytest.raises(RuntimeError, match="the loss is not -dot"):
        loss(token_weights, values).backward()


def test_a_gpus_gradient_of_logits_is_a_cpus():
    """The one that is compiled compares columns; the one in place scatters."""
    random = torch.Generator().manual_seed(1)
    logits = 5 * torch.randn(7, 33, generator=random, dtype=torch.float64)
    column = torch.tensor([3, -1, 0, 32, -1, 7, 7])
    grad = torch.randn(7, generator=random, dtype=torch.float64)
    given = column, logits.logsumexp(1), grad
    found = logprobs._gradient(logits, *given, torch.float64)
    torch.testing.assert_close(found, logprobs._gradient_in_place(logits.clone(), *given))
