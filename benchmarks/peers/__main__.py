"""One update and one round of sampling: TRL's, nemo_jepo's and plain PyTorch's, in one run on the same token ids.

    make peers                  TRL, in an environment of its own; without it TRL is left out
    python -m benchmarks.peers [--parts update_5m ...] [--threads 1] [--repetitions 5] [--out FILE]

    update_5m       5M-parameter Llama, vocabulary 1,024; 8 prompts of 16 to 64 tokens, 8 chains of 92, answers of 4
    update_gsm8k    the same with vocabulary 2,048; 16 prompts, 4 samples, lengths spread as GSM8K's
    sampling        64 completions of 96 tokens for the prompts of update_5m

Every variant is a process of its own, all on the same core (--threads 2: two cores), and does one repetition when it is
told to: ABC, CBA, ABC, ... Useful tokens are those of the sequences (sampling: the drawn ones); padding counts for
nothing. Times are processor seconds: what else runs on the machine moves them less than the clock's. A ratio is the
median over repetitions of baseline / variant, each pair from one repetition.

An update is what follows sampling: log-probs of the policy and of the reference policy, weights, forward and backward
pass, clipping, optimizer step, in fp32. The modules update_ours, update_trl, update_limit and sampling say what each
variant is. All but TRL, whose objective is another, must report the same gradient norm.
"""

import argparse
import math
import os
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import report
from benchmarks.peers.driver import ROOT, Variant, rounds_of
from benchmarks.peers.workload import FIRST_TOKEN, Group, Workload
from benchmarks.step import SHAPE, Lengths, gsm8k_like_lengths
from nemo_jepo.config.schema import AdvantageConfig, KLConfig, ObjectiveConfig
from nemo_jepo.setup import update_rule

TRL = ROOT / ".venv-trl" / "bin" / "python"
UPDATES = {
    "TRL": Variant("update_trl", python=str(TRL)),
    "nemo_jepo": Variant("update_ours"),
    "plain PyTorch, three passes": Variant("update_limit", ["three_passes"]),
    "plain PyTorch, one forward": Variant("update_limit", ["one_forward"]),
    "plain PyTorch, one forward, shared prompts": Variant("update_limit", ["shared_prompts"]),
}
SAMPLERS = {
    "transformers (TRL's)": Variant("sampling", ["transformers"]),
    "nemo_jepo": Variant("sampling", ["nemo_jepo"]),
    "plain PyTorch loop": Variant("sampling", ["plain_loop"]),
}
PARTS = {"update_5m": UPDATES, "update_gsm8k": UPDATES, "sampling": SAMPLERS}


@dataclass(frozen=True, slots=True)
class Size:
    """Of all workloads; the defaults are what the report shows."""

    hidden: int = 256
    layers: int = 6
    sequences: int = 64
    """Of every batch."""
    sequences_per_micro_batch: int = 16
    chain_tokens: int = 92
    """Of update_5m and sampling."""


def draw_workload(part: str, size: Size, threads: int) -> Workload:
    """Random token ids; siblings share the prompt and the answer."""
    shape = SHAPE | {
        "hidden_size": size.hidden,
        "intermediate_size": size.hidden * 11 // 4,
        "num_attention_heads": size.hidden // 32,
        "num_key_value_heads": size.hidden // 64,
        "num_hidden_layers": size.layers,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if part == "update_gsm8k":
        group_size, lengths = 4, gsm8k_like_lengths()
    else:
        group_size, lengths = 8, Lengths(range(16, 65), [size.chain_tokens], [4])
        shape |= {"vocab_size": 1024, "tie_word_embeddings": False}
    rng = random.Random(11)

    def tokens(counts: Sequence[int]) -> list[int]:
        return rng.choices(range(FIRST_TOKEN, shape["vocab_size"]), k=rng.choice(counts))

    groups = [
        Group(tokens(lengths.prompts), [tokens(lengths.chains) for _ in range(group_size)], tokens(lengths.answers))
        for _ in range(size.sequences // group_size)
    ]
    rule = update_rule(ObjectiveConfig(), AdvantageConfig(), KLConfig())
    return Workload(shape, groups, asdict(rule), size.sequences_per_micro_batch, threads)


def write_models(shape: Mapping[str, Any], folder: Path) -> None:
    """policy/ and reference/ in a folder: two random Llamas, so that the KL term is not zero."""
    for seed, name in enumerate(("policy", "reference")):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder / name)


def require_equal_gradients(rounds: Sequence[report.Round]) -> None:
    """All variants that report a gradient norm do the same work. Raises ValueError."""
    norms = [
        (name, metrics["grad_norm"]) for found in rounds for name, metrics in found.items() if "grad_norm" in metrics
    ]
    for name, norm in norms:
        if not math.isclose(norm, norms[0][1], rel_tol=1e-4):
            raise ValueError(f"gradient norms differ: {norms[0][0]} {norms[0][1]}, {name} {norm}")


def run_part(part: str, variants: Mapping[str, Variant], size: Size, cores: Sequence[int], repetitions: int) -> Any:
    """One workload's report.

    Args:
        cores: what every worker may run on.
    """
    work = draw_workload(part, size, len(cores))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work.write(folder)
        write_models(work.shape, folder)
        rounds = rounds_of(variants, folder, cores, 1, repetitions)
    require_equal_gradients(rounds)
    useful = work.num_completion_tokens if part == "sampling" else work.num_tokens
    for metrics in (metrics for found in rounds for metrics in found.values()):
        metrics["useful_tokens_per_cpu_second"] = useful / metrics["cpu_seconds"]
    baseline = next(iter(variants))
    return {
        "useful_tokens": useful,
        "sequences": len(work.groups) * work.group_size,
        "rounds": rounds,
        "medians": report.medians(rounds),
        "baseline": baseline,
        "speedup": {name: report.paired_ratio(rounds, "cpu_seconds", baseline, name) for name in variants},
    }


def run(parts: Mapping[str, Mapping[str, Variant]], size: Size, threads: int, repetitions: int) -> dict[str, Any]:
    """The whole report.

    Args:
        parts: a part's name -> its variants, the baseline first. One whose interpreter is not there is left out.
    """
    before = report.machine()
    cores = sorted(os.sched_getaffinity(0))[:threads]
    found, left_out = {}, set()
    for part, variants in parts.items():
        ready = {name: variant for name, variant in variants.items() if Path(variant.python).exists()}
        left_out |= set(variants) - set(ready)
        found[part] = run_part(part, ready, size, cores, repetitions)
    machine = before | {"threads": len(cores), "load_after": report.machine()["load"]}
    return {"benchmark": "peers", "machine": machine, "size": asdict(size), "left_out": sorted(left_out)} | found


def show(found: dict[str, Any]) -> str:
    """The report as tables."""
    blocks = [f"Without {name}: `make peers` installs it." for name in found["left_out"]]
    for part in (part for part in PARTS if part in found):
        of_part = found[part]
        header = ["", "CPU s", "min", "max", "wall s", "tokens/CPU s", "faster by", "min", "max", "computed", "peak MB"]
        rows = [[part, *header[1:]]]
        for name, medians in of_part["medians"].items():
            cpu = [metrics[name]["cpu_seconds"] for metrics in of_part["rounds"]]
            pairs = [
                metrics[of_part["baseline"]]["cpu_seconds"] / metrics[name]["cpu_seconds"]
                for metrics in of_part["rounds"]
            ]
            seconds = [f"{value:.2f}" for value in (medians["cpu_seconds"], min(cpu), max(cpu), medians["seconds"])]
            ratios = [f"{value:.2f}" for value in (of_part["speedup"][name], min(pairs), max(pairs))]
            rate, peak = medians["useful_tokens_per_cpu_second"], medians["peak_bytes"] / 1e6
            computed = medians.get("computed_tokens", medians.get("drawn_tokens", 0))
            rows.append([name, *seconds, f"{rate:.0f}", *ratios, f"{computed:.0f}", f"{peak:.0f}"])
        blocks.append(report.table(rows))
    return "\n\n".join(blocks)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    for name, default in asdict(Size()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = vars(parser.parse_args(arguments))
    parts, threads, repetitions, out = (options.pop(name) for name in ("parts", "threads", "repetitions", "out"))
    found = run({part: PARTS[part] for part in parts}, Size(**options), threads, repetitions)
    report.write(found, out)
    print(show(found))


if __name__ == "__main__":
    main()
