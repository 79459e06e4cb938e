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
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import logprob_memory, report
from benchmarks.h100.parts import (
    in_fresh_process,
    measure_logprobs,
    measure_packing,
    measure_updates,
    one_process,
    or_refusal,
)
from benchmarks.h100.workload import (
    DRY_SIZE,
    DRY_VARIANTS,
    MODELS,
    TOY,
    VARIANTS,
    Job,
    Size,
    Variant,
    batch_of,
    model_flops,
)
from nemo_jepo.actor.fp8_guard import Reading, squared_error, squared_spread

Start = Callable[..., Any]
"""Calls a function with arguments in another process."""
PARTS = ("updates", "logprobs", "packing")


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
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.h100", description=__doc__, formatter_class=raw)
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
