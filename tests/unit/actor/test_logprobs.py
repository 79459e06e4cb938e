"""The functions of a chunk of logits that a GPU compiles, against those that a CPU does in place; gradient sums."""

import torch

from nemo_jepo.actor import logprobs

CHUNK, VOCAB = 7, 33


def draw() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    logits = 5 * torch.randn(CHUNK, VOCAB, generator=random, dtype=torch.float64)
    here = torch.tensor([True, True, False, True, False, True, True])
    column = torch.where(here, torch.randint(VOCAB, (CHUNK,), generator=random), 0)
    grad = torch.randn(CHUNK, generator=random, dtype=torch.float64)
    return {"logits": logits, "column": column, "here": here, "grad": grad}


def test_sums_are_the_same_compiled_and_in_place():
    given = draw()
    rest = given["logits"].amax(1), given["column"], given["here"]
    found = logprobs._sums(given["logits"], *rest)
    torch.testing.assert_close(found, logprobs._sums_in_place(given["logits"].clone(), *rest))


def test_gradients_of_logits_are_the_same_compiled_and_in_place():
    given = draw()
    rest = given["logits"].logsumexp(1), given["column"], given["here"], given["grad"], torch.float64
    found = logprobs._logits_gradient(given["logits"], *rest)
    torch.testing.assert_close(found, logprobs._logits_gradient_in_place(given["logits"].clone(), *rest))


def test_the_output_matrixs_gradient_rounds_once_in_bf16_however_many_chunks():
    """256 chunks of one token: a sum in bf16 would lose what is smaller than a 256th of it each time."""
    random = torch.Generator().manual_seed(2)
    hidden = torch.randn(256, 8, generator=random).bfloat16()
    weight = torch.randn(16, 8, generator=random).bfloat16().requires_grad_()
    target = torch.randint(16, (256,), generator=random)

    def gradient(chunk: int) -> torch.Tensor:
        values, _ = logprobs.chunked_logprobs(hidden, weight, target, 0, chunk)
        return torch.autograd.grad(values.sum(), weight)[0].float()

    exact_weight = weight.detach().float().requires_grad_()
    values, _ = logprobs.chunked_logprobs(hidden.float(), exact_weight, target, 0, 256)
    (exact,) = torch.autograd.grad(values.sum(), exact_weight)
    few, many = ((gradient(chunk) - exact).norm() / exact.norm() for chunk in (256, 1))
    assert many < 1.5 * few
