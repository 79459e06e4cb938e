"""chunked_logprobs against log_softmax and autograd in float64; S tokens, H hidden size, V vocabulary."""

import math

import pytest
import torch

from nemo_jepo.actor.logprobs import chunked_logprobs
from tests.distributed.logprobs_jobs import one_shard
from tests.support.rank_pool import on_ranks

S, H, V = 13, 6, 11
Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def case(num_tokens: int = S, scale: float = 1.0, seed: int = 3) -> Case:
    """hidden, weight, target, and the gradient that comes back to the log-probs."""
    draw = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(num_tokens, H, generator=draw)
    weight = torch.randn(V, H, generator=draw)
    target = torch.randint(V, (num_tokens,), generator=draw)
    return hidden, weight, target, torch.randn(num_tokens, generator=draw)


def reference(hidden, weight, target, upstream) -> dict[str, torch.Tensor]:
    """Whole float64 logits, log_softmax, autograd."""
    hidden, weight = (tensor.double().requires_grad_() for tensor in (hidden, weight))
    log_p = (hidden @ weight.T).log_softmax(-1)
    logprobs = log_p.gather(1, target[:, None])[:, 0]
    logprobs.backward(upstream.double())
    entropies = -(log_p.exp() * log_p).sum(-1)
    return {"logprobs": logprobs, "entropies": entropies, "hidden_grad": hidden.grad, "weight_grad": weight.grad}


def chunked(hidden, weight, target, upstream, chunk_tokens: int) -> dict[str, torch.Tensor]:
    hidden, weight = (tensor.detach().clone().requires_grad_() for tensor in (hidden, weight))
    logprobs, entropies = chunked_logprobs(hidden, weight, target, 0, chunk_tokens)
    logprobs.backward(upstream)
    return {"logprobs": logprobs, "entropies": entropies, "hidden_grad": hidden.grad, "weight_grad": weight.grad}


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name].double(),
            expected[name].detach(),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("num_tokens, chunk_tokens", [(S, 1), (S, 4), (S, S), (S, 1000), (1, 4), (0, 4)])
def test_values_and_gradients_are_those_of_the_whole_softmax(num_tokens, chunk_tokens):
    inputs = case(num_tokens)
    found = chunked(*inputs, chunk_tokens)
    assert found["logprobs"].dtype == found["entropies"].dtype == torch.float32
    assert_near(found, reference(*inputs), 2e-6)


def test_logits_of_ten_thousand_stay_finite():
    hidden, weight, target, upstream = case(scale=1e4)
    assert (hidden @ weight.T).abs().max() > 1e4
    found = chunked(hidden, weight, target, upstream, 4)
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert found["logprobs"].min() < -1e4
    # fp32 spacing at 1e5 is 0.008: what the logits themselves are known to.
    assert_near(found, reference(hidden, weight, target, upstream), 0.02)


def test_a_certain_token_has_log_prob_and_entropy_zero():
    hidden, weight = torch.tensor([[2000.0]]), torch.tensor([[1.0], [0.0], [-1.0]])
    logprobs, entropies = chunked_logprobs(hidden, weight, torch.tensor([0]), 0, 1)
    assert logprobs.item() == 0.0 and entropies.item() == 0.0


def test_equal_logits_give_log_v():
    logprobs, entropies = chunked_logprobs(torch.zeros(2, H), torch.ones(V, H), torch.tensor([0, V - 1]), 0, 1)
    torch.testing.assert_close(logprobs, torch.full((2,), -math.log(V)))
    torch.testing.assert_close(entropies, torch.full((2,), math.log(V)))


def test_bf16_loses_the_rounding_of_its_logits_and_no_more():
    """A vocabulary of 4096 near-equal logits: a bf16 sum of their exponentials would stop growing at 256."""
    draw = torch.Generator().manual_seed(0)
    hidden = (0.1 * torch.randn(9, 16, generator=draw)).bfloat16()
    weight = (0.1 * torch.randn(4096, 16, generator=draw)).bfloat16()
    target = torch.randint(4096, (9,), generator=draw)
    upstream = torch.randn(9, generator=draw)
    expected = reference(hidden, weight, target, upstream)
    found = chunked(hidden, weight, target, upstream, 4)
    assert found["logprobs"].dtype == torch.float32
    largest_logit = (hidden.double() @ weight.double().T).abs().max().item()
    bound = 2 * largest_logit * 2**-8 + 1e-5  # bf16 rounds a logit by half of 2^-7 of it; two logits meet in a log-prob
    assert (found["logprobs"] - expected["logprobs"]).abs().max() < bound < 0.01
    assert (found["entropies"] - expected["entropies"]).abs().max() < bound
    for name in ("hidden_grad", "weight_grad"):
        error = (found[name].double() - expected[name]).norm() / expected[name].norm()
        assert found[name].dtype == torch.bfloat16 and error < 0.01


def test_entropies_carry_no_gradient():
    hidden, weight, target, _ = case()
    _, entropies = chunked_logprobs(hidden.requires_grad_(), weight, target, 0, 4)
    assert not entropies.requires_grad


@pytest.mark.parametrize("size", [2, 4])
def test_a_vocabulary_over_several_ranks_gives_what_one_process_gives(size):
    """11 columns over 2 ranks: 6 and 5; over 4: 3, 3, 3 and 2. Hidden gradients are the sum of the ranks' parts."""
    inputs = case(scale=3.0)
    shards = on_ranks(size, one_shard, *inputs)
    for shard in shards:
        found = {name: shard[name] for name in ("logprobs", "entropies")}
        found["hidden_grad"] = sum(other["hidden_grad"] for other in shards)
        found["weight_grad"] = torch.cat([other["weight_grad"] for other in shards])
        assert_near(found, reference(*inputs), 5e-6)
    assert [len(shard["weight_grad"]) for shard in shards] == {2: [6, 5], 4: [3, 3, 3, 2]}[size]
