"""Updates on one H100: BF16 against FP8, an 8B-shaped model with few layers and a whole 1B one.

    python -m benchmarks.h100 [--parts updates logprobs packing] [--models 8b_shape 1b] [--out FILE]
    python -m benchmarks.h100 --dry-run        the same code on the CPU at toy size; fp32 stands in for FP8

    scoring      one pass without gradients over the batch, as before every update
    update       forward and backward pass and optimizer step, token weights 1 / scored tokens: loss = mean NLL
    tokens/s     of the sequences; padding counts for nothing
    TFLOP/s      model FLOPs (`model_flops`: nothing for padding or recomputation) / seconds / 1e12
    of peak      TFLOP/s / the dense peak of an H100 SXM in the variant's precision: 989 in BF16, 1,979 in FP8
    memory       most that torch allocated, weights and optimizer state included
    agreement    of the same weights' log-probs, and of the loss over the updates, with the BF16 variant

Every variant runs in a process of its own (in a dry run all share one). One that cannot run here, for example without
Transformer Engine, is listed with the reason.
"""

import argparse
import dataclasses
import math
import multiprocessing
import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks import logprob_memory, report
from benchmarks.step import Batch, Lengths, draw_sequences, layouts
from nemo_jepo.actor import parallel
from nemo_jepo.actor.actor import MegatronJEPOActor
from nemo_jepo.actor.fp8_guard import Reading, squared_error, squared_spread
from nemo_jepo.actor.model import load_hf_config
from nemo_jepo.actor.weights.families import Shape
from nemo_jepo.actor.weights.load import load_stage, open_source
from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import ModelConfig, OptimConfig
from nemo_jepo.data.packing import pack
from nemo_jepo.objective.tables import group_scores
from nemo_jepo.types import PackedRow, Spliced, SplicedBatch

Start = Callable[..., Any]
"""Calls a function with arguments in another process."""
PARTS = ("updates", "logprobs", "packing")
PEAK_TFLOPS = {"bf16": 989.0, "fp8": 1979.0}
"""Dense peaks of one H100 SXM (NVIDIA's data sheet, without sparsity)."""
LLAMA3 = {"model_type": "llama", "vocab_size": 128_256, "max_position_embeddings": 131_072, "rope_theta": 500_000.0}
MODELS: dict[str, dict[str, Any]] = {
    "8b_shape": LLAMA3  # Llama 3.1 8B has 32 such layers
    | {
        "num_hidden_layers": 4,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "1b": LLAMA3  # Llama 3.2 1B, whole
    | {
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
}
TOY = {
    "vocab_size": 2048,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
}


@dataclass(frozen=True, slots=True)
class Variant:
    """How a model computes."""

    precision: str = "bf16"
    fp8: dict[str, Any] = field(default_factory=dict)
    """FP8 settings of the model; none for BF16."""

    @property
    def peak_tflops(self) -> float:
        """What its TFLOP/s are set against."""
        return PEAK_TFLOPS["fp8" if self.fp8 else "bf16"]


VARIANTS = {"bf16": Variant()} | {
    f"fp8 {recipe}": Variant(fp8={"fp8": "hybrid", "fp8_recipe": recipe}) for recipe in ("tensorwise", "blockwise")
}
DRY_VARIANTS = {"bf16": Variant(), "fp32": Variant(precision="fp32"), "fp8 tensorwise": VARIANTS["fp8 tensorwise"]}


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured; the defaults are a batch of proofs."""

    prompts: int = 16
    generations: int = 4
    tokens_per_row: int = 8192
    prompt_tokens: int = 200
    chain_tokens: int = 1000
    answer_tokens: int = 400
    updates: int = 4
    """Timed ones; one more comes first."""


DRY_SIZE = Size(4, 2, 256, prompt_tokens=8, chain_tokens=30, answer_tokens=10, updates=2)


@dataclass(frozen=True, slots=True)
class Job:
    """One process's work."""

    shape: dict[str, Any]
    variant: Variant
    size: Size


def proof_like_lengths(size: Size) -> Lengths:
    """Log-normal lengths with the size's means; a whole sequence always fits into a row."""
    rng = random.Random(7)

    def draw(mean: float, largest: int) -> list[int]:
        mu = math.log(mean) - 0.5**2 / 2
        return [min(largest, max(1, round(rng.lognormvariate(mu, 0.5)))) for _ in range(4096)]

    row = size.tokens_per_row
    return Lengths(
        draw(size.prompt_tokens, row // 8), draw(size.chain_tokens, row // 2), draw(size.answer_tokens, row // 4)
    )


def batch_of(size: Size) -> list[Spliced]:
    """The batch that every variant reads."""
    return draw_sequences(Batch(size.prompts, size.generations, size.tokens_per_row), proof_like_lengths(size))


def model_flops(shape: dict[str, Any], sequences: Sequence[Spliced]) -> float:
    """FLOPs of one forward and backward pass that the model needs, by its matrix products; a third of it forward.

        6 * (parameters in layers) * tokens + 6 * hidden * vocabulary * (scored tokens)
        + 12 * layers * (heads * head size) * sum over sequences of length^2 / 2

    The output head runs at scored tokens alone; the last term is attention, whose causal half is needed. Norms,
    lookups, padding, recomputed logits and the optimizer count for nothing.
    """
    model = Shape.of(load_hf_config(shape))
    hidden, queries, keys = model.hidden_size, model.num_heads * model.head_size, model.num_kv_heads * model.head_size
    layer = hidden * (2 * queries + 2 * keys) + 3 * hidden * model.inner_size
    tokens = sum(sequence.length for sequence in sequences)
    scored = sum(sequence.chain_length + sequence.answer_length for sequence in sequences)
    squares = sum(sequence.length**2 for sequence in sequences)
    products = 6 * model.num_layers * layer * tokens + 6 * hidden * model.vocab_size * scored
    return float(products + 12 * model.num_layers * queries * squares / 2)


def build(job: Job, tokens_per_row: int | None = None) -> MegatronJEPOActor:
    """A seeded random model that is ready to train, alone in its process."""
    tokens = tokens_per_row or job.size.tokens_per_row
    model = ModelConfig(hf_config=job.shape, tokens_per_micro_batch=tokens, **job.variant.fp8)
    parallel.init_distributed()
    parallel.init_model_parallel(model)
    layout, hf_config = parallel.Layout(), load_hf_config(job.shape)
    actor = MegatronJEPOActor(hf_config, model, job.variant.precision, layout)
    load_stage(actor.chunks, hf_config, open_source(hf_config, None, model.seed), layout)
    actor.start_training(OptimConfig(lr=1e-5), 1.0, 1000)
    return actor


def seconds_of(work: Callable[[], object]) -> float:
    """Wall-clock seconds until the work is done, on the GPU as well."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - begin


def peak_bytes() -> int:
    """Most that was allocated on the GPU, or resident on a CPU, since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else logprob_memory.process_bytes("VmHWM")


def reset_peak() -> None:
    """`peak_bytes` counts from here."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def mean_nll_weights(sequences: Sequence[Spliced]) -> list[Tensor]:
    """Token weights under which the loss is the mean NLL of a scored token."""
    counts = [sequence.chain_length + sequence.answer_length for sequence in sequences]
    return [torch.full((count,), 1.0 / sum(counts)) for count in counts]


def measure_updates(job: Job) -> dict[str, Any]:
    """Seconds, peak memory, losses and first log-probs of one variant."""
    sequences = batch_of(job.size)
    weights, actor = mean_nll_weights(sequences), build(job)
    rows = pack(sequences, replace(actor.row_shape, share_prompts=False))
    first = actor.get_inference_log_probs(rows, len(sequences))  # kernels and libraries load here
    scoring = [seconds_of(partial(actor.get_inference_log_probs, rows, len(sequences))) for _ in range(3)]
    batch = SplicedBatch(sequences=sequences, group_size=job.size.generations)
    losses = [actor.train_step(rows, weights)["surrogate_loss"]]  # optimizer states appear here
    reset_peak()
    updating = []
    for _ in range(job.size.updates):
        updating.append(seconds_of(lambda: losses.append(actor.train_step(rows, weights)["surrogate_loss"])))
    return {
        "scoring_seconds": scoring,
        "update_seconds": updating,
        "peak_bytes": peak_bytes(),
        "losses": losses,
        "token_logprobs": torch.cat(first.policy_logprobs).tolist(),
        "answer_logprobs": group_scores(batch, first).answer_logprob.tolist(),
    }


def measure_packing(job: Job) -> dict[str, float]:
    """Median seconds of an update over packed rows and over padded ones."""
    sequences = batch_of(job.size)
    weights = mean_nll_weights(sequences)
    actor = build(job)
    rows_of: dict[str, list[PackedRow]] = layouts(sequences, job.size.tokens_per_row)
    seconds: dict[str, list[float]] = {name: [] for name in rows_of}
    for repetition in range(1 + job.size.updates):
        for name, rows in rows_of.items():
            taken = seconds_of(partial(actor.train_step, rows, weights))
            if repetition:  # kernels load in the first
                seconds[name].append(taken)
    return {name: median(values) for name, values in seconds.items()}


def measure_logprobs(variant: str, size: logprob_memory.Size) -> dict[str, report.Metrics]:
    """Seconds and bytes of one way to compute log-probs in BF16, without gradients and with."""
    logprobs = logprob_memory.variants(size)[variant]
    toy = logprob_memory.Size(tokens=8, hidden=64, vocab=512)
    logprob_memory.backward(logprobs, logprob_memory.inputs(toy, torch.bfloat16))
    given = logprob_memory.inputs(size, torch.bfloat16)
    with torch.no_grad():
        logprobs(given)  # the products' kernels are chosen here
        without = logprob_memory.measured(lambda: logprobs(given))
    logprob_memory.backward(logprobs, given)
    given.hidden.grad = given.weight.grad = None
    with_gradients = logprob_memory.measured(lambda: logprob_memory.backward(logprobs, given))
    return {"without gradients": without, "with gradients": with_gradients}


def one_process() -> ProcessPoolExecutor:
    """A fresh process that does one piece of work after the other."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def in_fresh_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """work(*arguments) in a process that ends with it."""
    with one_process() as process:
        return process.submit(or_refusal, work, *arguments).result()


def or_refusal(work: Callable[..., Any], *arguments: Any) -> Any:
    """work(*arguments), or {"refused": line} where the settings or the memory do not allow it."""
    try:
        return work(*arguments)
    except (ConfigError, torch.OutOfMemoryError) as error:
        return {"refused": str(error).splitlines()[0]}


def agreement(found: dict[str, Any], exact: dict[str, Any]) -> dict[str, float]:
    """How far a variant's log-probs and losses are from another's; nats, and ratios."""
    tokens = torch.tensor(found["token_logprobs"]) - torch.tensor(exact["token_logprobs"])
    answers, exact_answers = (
        torch.tensor(measured["answer_logprobs"], dtype=torch.float64) for measured in (found, exact)
    )
    everywhere = torch.ones_like(answers, dtype=torch.bool)
    (error, samples), (spread, freedom) = (
        sums.tolist()
        for sums in (squared_error(answers, exact_answers, everywhere), squared_spread(answers, everywhere))
    )
    reading = Reading(error=math.sqrt(error / samples), spread=math.sqrt(spread / freedom))
    pairs = zip(found["losses"], exact["losses"], strict=True)
    return reading.metrics() | {
        "token_logprob_difference": tokens.abs().mean().item(),
        "largest_loss_difference": max(abs(loss / other - 1) for loss, other in pairs),
    }


def updates_report(start: Start, shape: dict[str, Any], variants: dict[str, Variant], size: Size) -> dict[str, Any]:
    """Every variant's measured over one model."""
    sequences = batch_of(size)
    flops, tokens = model_flops(shape, sequences), sum(sequence.length for sequence in sequences)
    raw = {name: start(measure_updates, Job(shape, variant, size)) for name, variant in variants.items()}
    measured: dict[str, Any] = {}
    for name, found in raw.items():
        if "refused" in found:
            measured[name] = found
            continue
        update, scoring = median(found["update_seconds"]), median(found["scoring_seconds"])
        tflops = flops / update / 1e12
        measured[name] = {
            "update_seconds": update,
            "update_tokens_per_second": tokens / update,
            "update_tflops": tflops,
            "peak_tflops": variants[name].peak_tflops,
            "share_of_peak": tflops / variants[name].peak_tflops,
            "scoring_seconds": scoring,
            "scoring_tokens_per_second": tokens / scoring,
            "scoring_tflops": flops / 3 / scoring / 1e12,
            "peak_bytes": found["peak_bytes"],
            "losses": found["losses"],
            "all_update_seconds": found["update_seconds"],
        } | ({} if "refused" in raw["bf16"] else {"agreement": agreement(found, raw["bf16"])})
    return {"tokens": tokens, "model_flops": flops, "variants": measured}


def run(models: Sequence[str], parts: Sequence[str], dry: bool) -> dict[str, Any]:
    """The whole report."""
    if not dry:
        return measure(in_fresh_process, models, parts, dry)
    with one_process() as shared:
        return measure(lambda *work: shared.submit(or_refusal, *work).result(), models, parts, dry)


def measure(start: Start, models: Sequence[str], parts: Sequence[str], dry: bool) -> dict[str, Any]:
    """The parts, one after the other."""
    size, variants = (DRY_SIZE, DRY_VARIANTS) if dry else (Size(), VARIANTS)
    shapes = {name: MODELS[name] | (TOY if dry else {}) for name in models}
    found: dict[str, Any] = {
        "benchmark": "h100",
        "dry_run": dry,
        "machine": report.machine(),
        "size": asdict(size),
        "models": shapes,
    }
    if "updates" in parts:
        found["updates"] = {name: updates_report(start, shape, variants, size) for name, shape in shapes.items()}
    if "logprobs" in parts:
        head = logprob_memory.Size(64, 32, 2048, 16) if dry else logprob_memory.Size(8192, 4096, 128_256, 384)
        found["logprobs"] = {"size": asdict(head)} | {
            name: start(measure_logprobs, name, head) for name in logprob_memory.variants(head)
        }
    if "packing" in parts:
        fewer = dataclasses.replace(size, prompts=max(2, size.prompts // 2))
        found["packing"] = {
            name: start(measure_packing, Job(shape, Variant(), fewer)) for name, shape in shapes.items()
        }
    return found


def show(found: dict[str, Any]) -> str:
    """The report as tables."""
    tables = []
    for model, measured in found.get("updates", {}).items():
        head = [model, "update s", "tokens/s", "TFLOP/s", "of peak", "scoring s", "memory GiB"]
        rows = [[*head, "error/spread", "token nats", "loss"]]
        for name, of_variant in measured["variants"].items():
            rows.append([name, *_update_cells(of_variant)])
        tables.append(report.table(rows))
        refused = {name: f["refused"] for name, f in measured["variants"].items() if "refused" in f}
        tables += [f"{name}: {line}" for name, line in refused.items()]
    if "logprobs" in found:
        rows = [["log-probs, bf16", "s", "s with gradients", "MB", "MB with gradients"]]
        for name in logprob_memory.variants(logprob_memory.Size()):
            measured = found["logprobs"][name]
            if "refused" in measured:
                tables.append(f"log-probs, {name}: {measured['refused']}")
                continue
            both = [measured["without gradients"], measured["with gradients"]]
            rows.append([name, *(f"{f['seconds']:.4f}" for f in both), *(f"{f['bytes'] / 1e6:.0f}" for f in both)])
        tables.append(report.table(rows))
    for model, seconds in found.get("packing", {}).items():
        rows = [[f"{model}, bf16", "update s", "packed is faster by"]]
        for name, taken in seconds.items():
            rows.append([name, f"{taken:.3f}", f"{taken / seconds['packed']:.2f}"])
        tables.append(report.table(rows) if "packed" in seconds else f"{model}: {seconds['refused']}")
    return "\n\n".join(tables)


def _update_cells(measured: dict[str, Any]) -> list[str]:
    if "refused" in measured:
        return ["refused", *[""] * 8]
    near = measured.get("agreement")
    return [
        f"{measured['update_seconds']:.3f}",
        f"{measured['update_tokens_per_second']:.0f}",
        f"{measured['update_tflops']:.3g}",
        f"{measured['share_of_peak']:.1%}",
        f"{measured['scoring_seconds']:.3f}",
        f"{measured['peak_bytes'] / 2**30:.1f}",
        *([f"{near['fp8_error_ratio']:.3f}"] if near else [""]),
        *([f"{near['token_logprob_difference']:.4f}"] if near else [""]),
        *([f"{near['largest_loss_difference']:.2%}"] if near else [""]),
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU, also where there is a GPU")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if options.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("there is no GPU here; --dry-run runs the same code at toy size")
    found = run(options.models, options.parts, options.dry_run)
    report.write(found, options.out)
    print(show(found))


if __name__ == "__main__":
    main()
