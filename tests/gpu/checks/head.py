"""The output head: blocks of logits against whole ones."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tests.gpu.checks.common import PEAK_TFLOPS, Report, Sizes, relative_error, seconds_of, synchronize

if TYPE_CHECKING:
    from benchmarks.logprob_memory import Inputs, LogProbs


def logprob_head(report: Report, size: Sizes) -> None:
    """Log-probs of one row from hidden states: milliseconds, memory, and the gradients' error in bf16.

    chunked: the gradient of the log-probs is known after the forward pass; fused: before it, from token weights. Both
    add the weight's gradient to a main_grad in fp32.
    """
    from benchmarks import logprob_memory

    tokens, hidden, vocab = size.head
    given = logprob_memory.inputs(logprob_memory.Size(tokens, hidden, vocab), torch.bfloat16)
    exact = head_gradients(given.hidden, given.weight, given.target, -given.token_weights)
    measure_head(report, "whole logits", logprob_memory.variants(logprob_memory.Size())["naive"], given, exact)
    for chunk in size.chunks:
        variants = logprob_memory.variants(logprob_memory.Size(tokens, hidden, vocab, chunk))
        for name in ("chunked", "fused"):
            measure_head(report, f"{name}, {chunk} tokens", variants[name], given, exact)


def measure_head(report: Report, name: str, logprobs: "LogProbs", given: "Inputs", exact: Sequence[Tensor]) -> None:
    """One way to compute the log-probs of a row."""
    from benchmarks import logprob_memory

    def both() -> None:
        given.hidden.grad = given.weight.grad = None
        logprob_memory.backward(logprobs, given)

    try:
        with torch.no_grad():
            logprobs(given)
            synchronize()
            without = logprob_memory.measured(lambda: logprobs(given))
            forward = seconds_of(lambda: logprobs(given))
        given.main_grad.zero_()
        both()
        found = given.hidden.grad, given.weight_gradient()
        errors = {n: relative_error(f, e) for n, f, e in zip(("hidden", "weight"), found, exact, strict=True)}
        del found
        given.hidden.grad = given.weight.grad = None
        synchronize()
        with_gradients = logprob_memory.measured(both)
        seconds = seconds_of(both)
    except (torch.OutOfMemoryError, RuntimeError, TypeError) as error:
        report[name] = str(error).splitlines()[0]
        report.expect(False, f"{name}: runs")
        return
    product = 2 * given.hidden.numel() * given.weight.shape[0]
    report[name] = {
        "forward_ms": 1e3 * forward,
        "forward_and_backward_ms": 1e3 * seconds,
        "share_of_peak": 3 * product / seconds / 1e12 / PEAK_TFLOPS,  # by the products that nobody can save
        "forward_mb": without["bytes"] / 1e6,
        "forward_and_backward_mb": with_gradients["bytes"] / 1e6,
        "gradient_errors": errors,
    }
    report.expect(max(errors.values()) < 0.02, f"{name}: gradients are within 2% of fp32")


def head_gradients(states: Tensor, weight: Tensor, target: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of hidden states and weight in fp32, a few tokens at a time."""
    wide = weight.detach().float()
    hidden_gradient = torch.empty_like(states, dtype=torch.float32)
    weight_gradient = torch.zeros_like(wide)
    for start in range(0, len(target), 1024):
        part = slice(start, start + 1024)
        own = states[part].detach().float()
        log_p = (own @ wide.t()).log_softmax(-1)
        gradient = log_p.exp_().mul_(-upstream[part, None])
        gradient.scatter_add_(1, target[part, None], upstream[part, None])
        hidden_gradient[part] = gradient @ wide
        weight_gradient.addmm_(gradient.t(), own)
    return hidden_gradient, weight_gradient
