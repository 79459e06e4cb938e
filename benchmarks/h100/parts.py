"""The measured parts, each a function that runs in a process of its own."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from benchmarks import logprob_memory, report
from benchmarks.h100.workload import Job, batch_of, mean_nll_weights
from benchmarks.step import layouts
from nemo_jepo.actor import parallel
from nemo_jepo.actor.actor import MegatronJEPOActor
from nemo_jepo.actor.model import load_hf_config
from nemo_jepo.actor.weights.load import load_stage, open_source
from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import ModelConfig, OptimConfig
from nemo_jepo.data.packing import pack
from nemo_jepo.objective.tables import group_scores
from nemo_jepo.types import PackedRow, SplicedBatch


def build(job: Job) -> MegatronJEPOActor:
    """A seeded random model that is ready to train, alone in its process."""
    model = ModelConfig(hf_config=job.shape, tokens_per_micro_batch=job.size.tokens_per_row, **job.variant.fp8)
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
