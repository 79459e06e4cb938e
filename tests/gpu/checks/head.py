"""The output head: chunks of log-probs against whole logits."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from unittest import mock

import torch
from torch import Tensor

from tests.gpu.checks.common import PEAK_TFLOPS, Report, Sizes, relative_error, seconds_of, synchronize


def logprob_head(report: Report, size: Sizes) -> None:
    """Log-probs of one row from hidden states, in chunks: milliseconds, memory, and the gradients' error in bf16."""
    from benchmarks import logprob_memory
    from nemo_jepo.actor.logprobs import _logits_gradient_in_place, _sums_in_place, chunked_logprobs

    tokens, hidden, vocab = size.head
    inputs = logprob_memory.inputs(logprob_memory.Size(tokens, hidden, vocab), torch.bfloat16)
    states, weight, target, upstream = inputs
    exact = head_gradients(states, weight, target, upstream.float())
    variants: dict[str, Callable[..., Tensor]] = {"whole logits": logprob_memory.naive_logprobs}
    for chunk in size.chunks:
        variants[f"chunks of {chunk}"] = lambda *given, chunk=chunk: chunked_logprobs(*given, 0, chunk)[0]
    for chunk in size.chunks[:1] + size.chunks[2:3]:
        variants[f"chunks of {chunk}, not compiled"] = variants[f"chunks of {chunk}"]
    for name, logprobs in variants.items():
        eager = mock.patch(
            "nemo_jepo.actor.logprobs._functions", lambda logits: (_sums_in_place, _logits_gradient_in_place)
        )
        with eager if "not compiled" in name else nullcontext():
            measure_head(report, name, logprobs, inputs, exact)


def measure_head(
    report: Report, name: str, logprobs: Callable[..., Tensor], inputs: Sequence[Tensor], exact: Sequence[Tensor]
) -> None:
    """One way to compute the log-probs of a row."""
    from benchmarks import logprob_memory

    states, weight, target, upstream = inputs
    upstream = upstream.float()
    product = 2 * states.numel() * weight.shape[0]

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(logprobs(states, weight, target), (states, weight), upstream)

    try:
        with torch.no_grad():
            logprobs(states, weight, target)
            synchronize()
            without = logprob_memory.measured(lambda: logprobs(states, weight, target))
            forward = seconds_of(lambda: logprobs(states, weight, target))
        found = both()
        errors = {n: relative_error(f, e) for n, f, e in zip(("hidden", "weight"), found, exact, strict=True)}
        del found
        synchronize()
        with_gradients = logprob_memory.measured(both)
        seconds = seconds_of(both)
    except (torch.OutOfMemoryError, RuntimeError, TypeError) as error:
        report[name] = str(error).splitlines()[0]
        return
    report[name] = {
        "forward_ms": 1e3 * forward,
        "forward_and_backward_ms": 1e3 * seconds,
        "share_of_peak": 4 * product / seconds / 1e12 / PEAK_TFLOPS,
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
