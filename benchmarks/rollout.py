"""Sampling and weight sync: embedded against vLLM, with and without stopping at the marker; a push against a copy.

    python -m benchmarks.rollout [--repetitions 3] [--out FILE]

A random model draws proof-length completions. Its marker is a character that comes by chance early in a completion; the
rest is the own answer that a likelihood objective never reads. Both samplers hold the same weights and run on one
thread. Needs vLLM (make vllm).

    tokens       decoded tokens a second, of all sequences together
    samples      completions a second
    sync         seconds until a server samples with the trainer's tensors, pause and cache reset included; CPU seconds
                 of the trainer's process and of the server's
    copy         seconds of a plain copy of the same bytes in memory
    hidden       1 - (step at max_staleness 1) / (step at 0), of whole training steps of the demo's model
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks import report
from nemo_jepo.config.schema import AnswerConfig, RolloutConfig, VLLMConfig
from nemo_jepo.data.splice import Splicer
from nemo_jepo.data.tokenizer import load_tokenizer, train_tokenizer
from nemo_jepo.rollout.embedded import EmbeddedSampler
from nemo_jepo.rollout.sampler import GenerationRequest
from nemo_jepo.rollout.vllm.client import stop_strings
from nemo_jepo.rollout.vllm.local import LocalServers, ServedModel
from nemo_jepo.rollout.vllm.pool import Pool
from nemo_jepo.rollout.vllm.push import WeightTransfer
from nemo_jepo.rollout.vllm.server import health_of
from nemo_jepo.types import Prompt, Rollout

ROOT = Path(__file__).parents[1]
MARKER = "@"
VOCAB = 512
KEY = "benchmark"


def build_model(hidden: int, layers: int, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A seeded random Llama."""
    shape = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=hidden * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(shape, dtype=torch.float32).requires_grad_(False).eval()


def build_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A small one in which the marker is a character of its own, so that about 1 token in VOCAB / 3 holds it."""
    train_tokenizer(["a proof of the claim @@@ by induction"] * 4, VOCAB, folder)
    return load_tokenizer(folder)


@contextmanager
def one_server(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Iterator[Pool]:
    """A pool with one vLLM server of the model's shape and random weights of its own."""
    model.config.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    servers = LocalServers(ServedModel(folder / "model", "float32", 1024), VLLMConfig(), KEY, folder, 0)
    servers.start()
    pool = None
    try:
        while health_of(servers.urls[0]) != "good":
            assert not servers.ended(), servers.ended()
            time.sleep(0.2)
        pool = Pool(servers.urls, VLLMConfig(), KEY, VOCAB)
        yield pool
    finally:
        if pool is not None:
            pool.close()
        servers.close()


def metrics(rollouts: Sequence[Rollout], seconds: float) -> report.Metrics:
    """Of one batch."""
    tokens = sum(len(rollout.token_ids) for rollout in rollouts)
    return {
        "seconds": seconds,
        "decoded_tokens": float(tokens),
        "tokens_per_second": tokens / seconds,
        "samples_per_second": len(rollouts) / seconds,
    }


def measure_sampling(
    pool: Pool, embedded: EmbeddedSampler, prompts: Sequence[Prompt], max_tokens: int, seed: int
) -> report.Round:
    """One repetition: both samplers, with and without stopping at the marker, one after the other."""
    found: report.Round = {}
    for stop in (True, False):
        request = GenerationRequest(
            num_generations_per_prompt=4, max_tokens=max_tokens, stop_at_marker=stop, temperature=1.0, seed=seed
        )
        suffix = "stop" if stop else "whole"
        began = time.perf_counter()
        rollouts = embedded.generate(prompts, request)
        found[f"embedded, {suffix}"] = metrics(rollouts, time.perf_counter() - began)
        began = time.perf_counter()
        rollouts = pool.submit(prompts, request, stop_strings(MARKER) if stop else ()).result()
        found[f"vllm, {suffix}"] = metrics(rollouts, time.perf_counter() - began)
    return found


def sampling(num_prompts: int, max_tokens: int, repetitions: int, folder: Path) -> dict[str, Any]:
    """Embedded against vLLM on one model."""
    tokenizer = build_tokenizer(folder / "tokenizer")
    model = build_model(128, 4, tokenizer)
    splicer = Splicer(tokenizer, AnswerConfig(marker=MARKER))
    embedded = EmbeddedSampler(
        model.config, RolloutConfig(), tokenizer.eos_token_id, splicer.stop_after, torch.device("cpu"), torch.float32
    )
    embedded.load_weights(model.named_parameters(), 0)
    prompts = [Prompt(i, tuple(range(10 + i, 74 + i)), "claim", "proof") for i in range(num_prompts)]
    with one_server(model, tokenizer, folder) as pool:
        push(pool, model, "gloo", 0, folder)
        measure_sampling(pool, embedded, prompts[:2], max_tokens, seed=99)  # warm up
        rounds = [measure_sampling(pool, embedded, prompts, max_tokens, seed) for seed in range(repetitions)]
    ratios = {
        f"{name}: vllm / embedded, {suffix}": report.paired_ratio(
            rounds, name, f"vllm, {suffix}", f"embedded, {suffix}"
        )
        for name in ("tokens_per_second", "samples_per_second")
        for suffix in ("stop", "whole")
    }
    for sampler in ("embedded", "vllm"):
        for name in ("seconds", "decoded_tokens"):
            ratio = report.paired_ratio(rounds, name, f"{sampler}, stop", f"{sampler}, whole")
            ratios[f"{name}: stop / whole, {sampler}"] = ratio
    return {"medians": report.medians(rounds), "ratios": ratios, "rounds": rounds}


def server_cpu_seconds() -> float:
    """Of the server and its workers so far."""
    return sum(sum(process.cpu_times()[:2]) for process in psutil.Process().children(recursive=True))


def push(pool: Pool, model: PreTrainedModel, backend: str, version: int, folder: Path) -> report.Metrics:
    """A push by a new trainer, its rendezvous left out; the server is admitted."""
    tensors = list(model.named_parameters())
    shapes = [(name, tuple(tensor.shape)) for name, tensor in tensors]
    transfer = WeightTransfer(
        pool.control, VLLMConfig(weight_transfer=backend), shapes, torch.float32, folder / "weights"
    )
    (url,) = [*pool.ready(), *pool.out()]
    transfer.push([url], tensors, version)  # opens the connection
    began, own, theirs = time.perf_counter(), time.process_time(), server_cpu_seconds()
    pushed = transfer.push([url], tensors, version)
    found = {
        "seconds": time.perf_counter() - began,
        "trainer_cpu_seconds": time.process_time() - own,
        "server_cpu_seconds": server_cpu_seconds() - theirs,
    }
    assert pushed.updated == (url,), pushed
    pool.admit(url, version)
    transfer.close()
    return found


def sync(hidden: int, layers: int, repetitions: int, folder: Path) -> dict[str, Any]:
    """Pushes of a larger model against a copy of its bytes."""
    tokenizer = build_tokenizer(folder / "tokenizer")
    model = build_model(hidden, layers, tokenizer)
    num_bytes = sum(tensor.nbytes for tensor in model.parameters())
    rounds = []
    with one_server(model, tokenizer, folder) as pool:
        for _ in range(repetitions):
            targets = [torch.empty_like(tensor) for tensor in model.parameters()]
            began = time.perf_counter()
            for target, tensor in zip(targets, model.parameters(), strict=True):
                target.copy_(tensor)
            copied = time.perf_counter() - began
            found: report.Round = {"copy": {"seconds": copied}}
            for backend in ("gloo", "file"):
                found[backend] = push(pool, model, backend, 0, folder)
            rounds.append(found)
    ratios = {f"{name} / copy": report.paired_ratio(rounds, "seconds", name, "copy") for name in ("gloo", "file")}
    return {"bytes": num_bytes, "medians": report.medians(rounds), "ratios": ratios, "rounds": rounds}


def training_steps(max_staleness: int, num_steps: int, folder: Path) -> report.Metrics:
    """Median seconds of a step of the demo's model and of what it waited for rollouts; the first two steps left out."""
    overrides = ["rollout=vllm", "warmup.max_steps=0", "data.num_validation_prompts=1", f"exp_manager.exp_dir={folder}"]
    overrides += [f"exp_manager.name=k{max_staleness}", f"rollout.max_staleness={max_staleness}"]
    overrides += [f"trainer.jepo.max_steps={num_steps}", "trainer.jepo.val_at_start=false", "rollout.max_tokens=160"]
    overrides += ["trainer.jepo.save_interval=0", "trainer.jepo.val_check_interval=0", "rollout.stop_at_marker=false"]
    overrides += ["objective.importance_sampling=token_truncated", "exp_manager.create_tensorboard_logger=false"]
    overrides += ["model.hf_config.max_position_embeddings=512", "model.tokens_per_micro_batch=2240"]
    command = [sys.executable, "-m", "nemo_jepo.cli", "train", "--config-name=demo", *overrides]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (folder / f"k{max_staleness}" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines][2:-1]  # the last one has nothing to begin
    return {name: median(step[f"timers/{name}"] for step in steps) for name in ("step_time", "generate", "weight_sync")}


def hidden(num_steps: int, repetitions: int, folder: Path) -> dict[str, Any]:
    """How much of a step sampling ahead hides."""
    rounds = [
        {f"max_staleness {k}": training_steps(k, num_steps, folder / str(repetition)) for k in (0, 1)}
        for repetition in range(repetitions)
    ]
    ratio = report.paired_ratio(rounds, "step_time", "max_staleness 1", "max_staleness 0")
    return {"medians": report.medians(rounds), "ratios": {"hidden share of a step": 1 - ratio}, "rounds": rounds}


def run(num_prompts: int, max_tokens: int, width: int, num_steps: int, repetitions: int) -> dict[str, Any]:
    """The whole report."""
    torch.set_num_threads(1)
    before = report.machine()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = {
            "sampling": sampling(num_prompts, max_tokens, repetitions, folder / "sampling"),
            "sync": sync(width, 8, repetitions, folder / "sync"),
            "hidden": hidden(num_steps, repetitions, folder / "hidden"),
        }
    size = {"prompts": num_prompts, "generations": 4, "max_tokens": max_tokens, "sync_hidden_size": width}
    machine = before | {"load_after": report.machine()["load"]}
    return {"benchmark": "rollout", "machine": machine, "size": size | {"steps": num_steps}} | parts


def show(found: dict[str, Any]) -> str:
    """The metrics as text."""
    names = ("tokens_per_second", "samples_per_second", "decoded_tokens")
    rows = [["sampling", "tokens/s", "samples/s", "decoded"]]
    for variant, values in found["sampling"]["medians"].items():
        rows.append([variant, *(f"{values[name]:.1f}" for name in names)])
    lines = [report.table(rows), "", f"sync of {found['sync']['bytes'] / 1e6:.0f} MB"]
    lines += [f"  {name:<5} {values['seconds']:.3f} s" for name, values in found["sync"]["medians"].items()]
    for part in ("sampling", "sync", "hidden"):
        lines += ["", *(f"{ratio:>8.2f}  {name}" for name, ratio in found[part]["ratios"].items())]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"num-prompts": 16, "max-tokens": 512, "width": 768, "num-steps": 8, "repetitions": 3}
    for option, default in sizes.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    options = vars(parser.parse_args(arguments))
    out = options.pop("out")
    found = run(**options)
    report.write(found, out)
    print(show(found))


if __name__ == "__main__":
    main()
