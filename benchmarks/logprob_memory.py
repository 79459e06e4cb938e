"""From hidden states to log-probs and back to gradients: chunked_logprobs against full logits, in memory and time.

    python -m benchmarks.logprob_memory [--tokens 4096] [--chunk-tokens 384] [--out FILE]

Every measurement is a fresh process that makes its inputs, touches them, and only then counts: peak resident memory
(allocated memory on a GPU) over what the inputs hold, gradients included, and seconds. main_grad, which Megatron's DDP
holds through all of training, is an input. Linux only.
"""

import argparse
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from nemo_jepo.actor.logprobs import chunked_logprobs

LogProbs = Callable[["Inputs"], Tensor]
RESULTS = ("logprobs", "hidden_gradient", "weight_gradient")


@dataclass(frozen=True, slots=True)
class Size:
    """What is computed; the defaults are one row of a 1B-class model with the vocabulary of Llama 3."""

    tokens: int = 4096
    hidden: int = 1024
    vocab: int = 128_256
    chunk_tokens: int = 384
    threads: int = 0
    """CPU threads; 0 leaves the choice to torch."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What every variant is given: hidden [S, H] and weight [V, H], which ask for gradients, target [S]."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    token_weights: Tensor
    """[S] fp32; the loss is -dot(token_weights, logprobs)."""
    main_grad: Tensor
    """[V, H] fp32, where a gradient of the weight may be added."""

    def to(self, dtype: torch.dtype) -> "Inputs":
        """The same in another precision, as leaves."""
        hidden, weight = (tensor.detach().to(dtype).requires_grad_() for tensor in (self.hidden, self.weight))
        return Inputs(hidden, weight, self.target, self.token_weights.to(dtype), self.main_grad.to(dtype))

    def weight_gradient(self) -> Tensor:
        """What the backward pass added up, whether in weight.grad or in main_grad."""
        return self.main_grad if self.weight.grad is None else self.main_grad + self.weight.grad


def naive_logprobs(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Log-probs [S] from all logits at once: log_softmax in fp32 (fp64 for fp64), gather, autograd."""
    precision = torch.promote_types(hidden.dtype, torch.float32)
    return (hidden @ weight.t()).to(precision).log_softmax(-1).gather(-1, target[:, None])[:, 0]


def variants(size: Size) -> dict[str, LogProbs]:
    """What is compared; the first is the baseline.

    chunked knows the token weights after the forward pass only, and also computes the entropies, as in an update of one
    pass; fused knows them before. Both add the weight's gradient to main_grad.
    """

    def chunked(given: Inputs, **known: Any) -> Tensor:
        tensors = given.hidden, given.weight, given.target
        return chunked_logprobs(*tensors, 0, size.chunk_tokens, main_grad=given.main_grad, **known)[0]

    return {
        "naive": lambda given: naive_logprobs(given.hidden, given.weight, given.target),
        "chunked": chunked,
        "fused": lambda given: chunked(given, token_weights=given.token_weights, with_entropy=False),
    }


def backward(logprobs: LogProbs, given: Inputs) -> Tensor:
    """Log-probs, after the backward pass."""
    values = logprobs(given)
    (-torch.dot(given.token_weights, values)).backward()
    return values.detach()


def inputs(size: Size, dtype: torch.dtype = torch.float32) -> Inputs:
    """Random ones; every page of them is touched."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    random = torch.Generator(device).manual_seed(1)
    hidden = torch.randn(size.tokens, size.hidden, generator=random, device=device, dtype=dtype)
    weight = torch.randn(size.vocab, size.hidden, generator=random, device=device, dtype=dtype)
    weight.mul_(size.hidden**-0.5)  # logits of unit variance
    target = torch.randint(size.vocab, (size.tokens,), generator=random, device=device)
    precision = torch.promote_types(dtype, torch.float32)
    token_weights = torch.randn(size.tokens, generator=random, device=device, dtype=dtype).to(precision)
    main_grad = torch.zeros_like(weight, dtype=precision).zero_()
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), target, token_weights, main_grad)


def process_bytes(field: str) -> int:
    """VmRSS (resident now) or VmHWM (most since the last reset) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measured(work: Callable[[], object]) -> report.Metrics:
    """Seconds, processor seconds, and peak bytes over what was held before, of one call.

    Processor seconds are the host's, summed over threads. With one thread they leave out the time that other programs
    took from it, so on a busy machine without a GPU they are the steadier metric.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS, proc(5)
        held = process_bytes("VmRSS")
    begin, begin_processor = perf_counter(), process_time()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    seconds, processor_seconds = perf_counter() - begin, process_time() - begin_processor
    peak = torch.cuda.max_memory_allocated() if on_gpu else process_bytes("VmHWM")
    return {"seconds": seconds, "processor_seconds": processor_seconds, "bytes": peak - held}


def measure(variant: str, size: Size) -> report.Metrics:
    """One variant's metrics, first without gradients, then with."""
    if size.threads:
        torch.set_num_threads(size.threads)
    logprobs = variants(size)[variant]
    backward(logprobs, inputs(Size(tokens=8, hidden=64, vocab=512)))  # libraries and kernels load here
    given = inputs(size)
    with torch.no_grad():
        without = measured(lambda: logprobs(given))
    with_gradients = measured(lambda: backward(logprobs, given))
    return {f"{name}_without_gradients": value for name, value in without.items()} | {
        f"{name}_with_gradients": value for name, value in with_gradients.items()
    }


def in_fresh_process(variant: str, size: Size) -> report.Metrics:
    """`measure` in a process of its own, so that no memory is left over from another variant."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, variant, size).result()


def differences(size: Size) -> dict[str, dict[str, float]]:
    """Largest difference of each variant in fp32 from full logits in fp64: log-probs and both gradients."""
    outcomes = {}
    for name, dtype, logprobs in [
        ("fp64", torch.float64, variants(size)["naive"]),
        *((name, torch.float32, logprobs) for name, logprobs in variants(size).items()),
    ]:
        given = inputs(size).to(dtype)
        values = backward(logprobs, given)
        outcomes[name] = dict(zip(RESULTS, (values, given.hidden.grad, given.weight_gradient()), strict=True))
    exact = outcomes.pop("fp64")
    return {
        name: {field: (value.double() - exact[field]).abs().max().item() for field, value in found.items()}
        for name, found in outcomes.items()
    }


def run(size: Size, repetitions: int) -> dict[str, Any]:
    """The whole report."""
    before = report.machine()
    rounds = [{name: in_fresh_process(name, size) for name in variants(size)} for _ in range(repetitions)]
    names = list(rounds[0]["naive"])
    return {
        "benchmark": "logprob_memory",
        "machine": before | {"threads": size.threads or before["threads"], "load_after": report.machine()["load"]},
        "size": asdict(size),
        "gradient_bytes": 4 * size.hidden * (size.tokens + size.vocab),
        "rounds": rounds,
        "medians": report.medians(rounds),
        "ratios": {
            variant: {name: report.paired_ratio(rounds, name, variant, "naive") for name in names}
            for variant in list(rounds[0])[1:]
        },
        "differences_from_fp64": differences(Size(tokens=96, hidden=256, vocab=8000, chunk_tokens=40)),
    }


def show(found: dict[str, Any]) -> str:
    """The report as a table."""
    rows = [["", *found["medians"], *(f"{variant} / naive" for variant in found["ratios"])]]
    for name in found["medians"]["naive"]:
        ratios = [f"{ratio[name]:.3f}" for ratio in found["ratios"].values()]
        values = [metrics[name] for metrics in found["medians"].values()]
        memory = name.startswith("bytes")
        cells = [f"{value / 1e6:.0f} MB" if memory else f"{value:.2f} s" for value in values]
        label = name.replace("processor_seconds", "processor time").replace("seconds", "time").replace("bytes", "peak")
        rows.append([label.replace("_", " "), *cells, *ratios])
    for name in found["differences_from_fp64"]["naive"]:
        cells = [f"{metrics[name]:.1e}" for metrics in found["differences_from_fp64"].values()]
        rows.append([f"fp64 difference, {name.replace('_', ' ')}", *cells, *("" for _ in found["ratios"])])
    return report.table(rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in asdict(Size()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = vars(parser.parse_args(arguments))
    repetitions, out = options.pop("repetitions"), options.pop("out")
    found = run(Size(**options), repetitions)
    report.write(found, out)
    print(show(found))


if __name__ == "__main__":
    main()
