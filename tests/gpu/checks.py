"""The checks of `tests.gpu.accept`, each in a process of its own.

python -m tests.gpu.checks NAME OUT.json [--dry-run]

A check writes down what it measures and then says what must hold, so a failed one still shows its measurements. With
--dry-run everything is small enough for a CPU, and what only a GPU has is left out.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest import mock
from xml.etree import ElementTree

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
PEAK_TFLOPS = 989.0
"""Dense bf16 peak of an H100 or H200 SXM by its data sheet: the denominator of every share of peak."""
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


class Skip(Exception):
    """The check cannot run here; says why."""


class Report(dict[str, Any]):
    """What a check measured, and which of its rules do not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []

    def expect(self, holds: bool, rule: str) -> None:
        """Note a rule that does not hold."""
        if not holds:
            self.faults.append(rule)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the measured things are."""

    matrix: int = 8192
    copied_bytes: int = 1 << 33
    segments: tuple[int, ...] = (1500, 1300, 900, 128, 128, 128, 12)
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    families: tuple[str, ...] = ("llama", "llama3", "qwen2", "qwen3", "qwen3_moe", "mixtral")
    crossing: tuple[str, ...] = ("qwen3", "qwen3_moe")
    layers: int = 4
    more_layers: int = 8
    rows: tuple[int, ...] = (4096, 8192)
    prompts: int = 8
    generations: int = 4
    lengths: tuple[int, int, int] = (200, 1000, 400)
    updates: int = 3
    head: tuple[int, int, int] = (8192, 4096, 128_256)
    chunks: tuple[int, ...] = (384, 1024, 2048, 4096)
    race_tensors: int = 40
    race_elements: int = 1 << 22
    run_steps: int = 3
    run_prompts: int = 32
    warmup_steps: int = 150
    validation: int = 64

    @classmethod
    def dry(cls) -> "Sizes":
        """The same for a CPU, in seconds."""
        return cls(
            matrix=128,
            copied_bytes=1 << 20,
            segments=(20, 12, 7, 1),
            heads=4,
            kv_heads=2,
            head_size=16,
            families=("llama",),
            crossing=("qwen3_moe",),
            layers=2,
            more_layers=3,
            rows=(128, 256),
            prompts=2,
            generations=2,
            lengths=(8, 30, 10),
            updates=2,
            head=(64, 32, 2048),
            chunks=(16, 64),
            race_tensors=8,
            race_elements=1 << 8,
            run_steps=1,
            run_prompts=2,
            warmup_steps=2,
            validation=4,
        )


# ---- what the checks share


def synchronize() -> None:
    """Wait for the GPU."""
    if GPU:
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any], times: int = 3) -> float:
    """Median wall-clock seconds of a call that is done when the device is."""
    taken = []
    for _ in range(times):
        synchronize()
        begin = perf_counter()
        work()
        synchronize()
        taken.append(perf_counter() - begin)
    return statistics.median(taken)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact|, in the Euclidean norm."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def peak_gib() -> float:
    """Most that torch allocated on the GPU since reset_peak; 0 without one."""
    return torch.cuda.max_memory_allocated() / 2**30 if GPU else 0.0


def reset_peak() -> None:
    """peak_gib counts from here."""
    if GPU:
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def local_layers() -> Iterator[None]:
    """Without Transformer Engine, also where it is installed."""
    from nemo_jepo.actor import model

    with mock.patch.object(model, "use_transformer_engine", lambda: False):
        yield


def require_transformer_engine() -> None:
    """Skip where it is missing or cannot be loaded."""
    if not GPU:
        raise Skip("needs a GPU")
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError as error:
        raise Skip(f"Transformer Engine is not installed ({error})") from error


KINDS = {
    "attention": ("flash", "fmha", "attention", "attn", "dot_do_o"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk"),
    "optimizer": ("adam", "multi_tensor", "foreach"),
    "norms": ("norm",),
    "copies": ("memcpy", "memset", "copybatched", "batchedcopy", "copy_kernel"),
    "casts to FP8": ("fp8", "block_scaled", "quantize"),
    "sums of gradients": ("add<float>",),
}


def kind_of(kernel: str) -> str:
    """What a kernel is for, by its name."""
    name = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def profile(work: Callable[[], Any]) -> dict[str, Any]:
    """Where one call's time goes: GPU seconds by kind and by kernel, launches, and how busy the GPU is."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if GPU else [])
    synchronize()
    with torch_profile(activities=activities) as found:
        begin = perf_counter()
        work()
        issued = perf_counter() - begin
        synchronize()
        wall = perf_counter() - begin
    kernels: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    launches = 0
    for event in found.key_averages():
        if event.key in ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx"):
            launches += event.count
        if str(event.device_type).endswith("CUDA") and "#" not in event.key:  # "#" marks an optimizer's whole step
            kernels[event.key] += event.self_device_time_total / 1e6
            calls[event.key] += event.count
    kinds: Counter[str] = Counter()
    for kernel, seconds in kernels.items():
        kinds[kind_of(kernel)] += seconds
    busy = sum(kernels.values())
    top = kernels.most_common(20)
    return {
        "wall_seconds": wall,
        "host_seconds": issued,
        "gpu_seconds": busy,
        "gpu_busy": busy / wall,
        "launches": launches,
        "seconds_by_kind": dict(kinds.most_common()),
        "top_kernels": [{"kernel": name[:120], "seconds": seconds, "calls": calls[name]} for name, seconds in top],
    }


def waits(work: Callable[[], Any]) -> dict[str, int]:
    """How often the host waits for the GPU inside torch in one call, by the line that asks."""
    if not GPU:
        work()
        return {}
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines = Counter(f"{'/'.join(Path(w.filename).parts[-3:])}:{w.lineno}" for w in said if "synchron" in str(w.message))
    return dict(lines.most_common(12))


# ---- what there is


def versions(report: Report, size: Sizes) -> None:
    """What runs here, and what is missing."""
    report["python"] = platform.python_version()
    names = ("torch", "triton", "transformers", "megatron-core", "transformer-engine", "vllm", "flash-attn", "numpy")
    installed = {}
    for name in names:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "not installed"
    report["packages"] = installed
    report["cuda"] = torch.version.cuda
    report["cores"] = os.cpu_count()
    report.expect(installed["megatron-core"] != "not installed", "megatron-core is installed")
    if not GPU:
        raise Skip("there is no GPU here")
    properties = torch.cuda.get_device_properties(0)
    report["device"] = torch.cuda.get_device_name()
    report["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    report["memory_gib"] = properties.total_memory / 2**30
    report["multiprocessors"] = properties.multi_processor_count
    report["cudnn"] = torch.backends.cudnn.version()
    report["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    report["driver, largest clock, power limit"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()


def ceilings(report: Report, size: Sizes) -> None:
    """What this device does at best: a bf16 matrix product of random data, and a copy."""
    dtype = torch.bfloat16 if GPU else torch.float32
    left, right = (torch.randn(size.matrix, size.matrix, device=DEVICE, dtype=dtype) for _ in range(2))
    torch.mm(left, right)
    seconds = seconds_of(lambda: [torch.mm(left, right) for _ in range(10)]) / 10
    report["matrix_product_tflops"] = 2 * size.matrix**3 / seconds / 1e12
    report["share_of_peak"] = report["matrix_product_tflops"] / PEAK_TFLOPS
    source = torch.randn(size.copied_bytes // 4, device=DEVICE)
    target = torch.empty_like(source)
    target.copy_(source)
    report["copy_gb_per_second"] = 2 * size.copied_bytes / seconds_of(lambda: target.copy_(source)) / 1e9


# ---- attention


def attention(report: Report, size: Sizes) -> None:
    """Packed attention against SDPA of every segment alone in fp32: which kernels ran, errors, milliseconds."""
    from nemo_jepo.actor.attention import PackedAttention, PackedRowParams, has_flash_attention

    bounds = torch.tensor([0, *size.segments], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tokens, longest = int(bounds[-1]), max(size.segments)
    draw = torch.Generator(DEVICE).manual_seed(1)
    dtype = torch.bfloat16 if GPU else torch.float32
    counts = (size.heads, size.kv_heads, size.kv_heads)
    inputs = [torch.randn(tokens, n, size.head_size, generator=draw, device=DEVICE).to(dtype) for n in counts]
    upstream = torch.randn(tokens, size.heads * size.head_size, generator=draw, device=DEVICE).to(dtype)

    def results(attend: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        own = [tensor.to(dtype).detach().requires_grad_() for tensor in inputs]
        output = attend(*own)
        return [output.detach(), *torch.autograd.grad(output, own, upstream.to(dtype))]

    def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        outputs = []
        for segment in zip(*(tensor.split(size.segments) for tensor in (query, key, value)), strict=True):
            q, k, v = (tensor.transpose(0, 1)[None] for tensor in segment)
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                found = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            outputs.append(found[0].transpose(0, 1).flatten(1))
        return torch.cat(outputs)

    row = PackedRowParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        bounds=bounds,
        device=torch.device(DEVICE),
    )
    local = PackedAttention(None, 1)  # type: ignore[arg-type]
    variants: dict[str, Callable[..., Tensor]] = {"SDPA over buckets": partial(local._buckets, row=row)}
    if has_flash_attention(inputs[0]):
        variants["torch flash attention"] = partial(local._flash, row=row)
    report["local layers use"] = list(variants)[-1]
    report.expect(not GPU or len(variants) == 2, "torch's flash attention serves packed rows")
    try:
        require_transformer_engine()
        variants["Transformer Engine"] = transformer_engine_attention(size, bounds.to(DEVICE), longest)
    except Skip as missing:
        report["Transformer Engine"] = str(missing)

    expected = results(exact, torch.float32)
    length = torch.tensor(size.segments, dtype=torch.float64)
    flops = 4 * size.heads * size.head_size * float((length**2).sum()) / 2
    for name, attend in variants.items():
        found = results(attend, dtype)
        names = ("output", "query gradient", "key gradient", "value gradient")
        errors = {n: relative_error(f, e) for n, f, e in zip(names, found, expected, strict=True)}
        with torch.no_grad():
            forward = seconds_of(lambda attend=attend: [attend(*inputs) for _ in range(10)]) / 10
        both = seconds_of(lambda attend=attend: [results(attend, dtype) for _ in range(10)]) / 10
        traced = profile(lambda attend=attend: results(attend, dtype))
        report[name] = {
            "errors": errors,
            "forward_ms": 1e3 * forward,
            "forward_and_backward_ms": 1e3 * both,
            "forward_tflops": flops / forward / 1e12,
            "waits": waits(lambda attend=attend: results(attend, dtype)),
            "kernels": [k["kernel"] for k in traced["top_kernels"] if kind_of(k["kernel"]) == "attention"][:4],
        }
        report.expect(max(errors.values()) < 0.02, f"{name} is within 2% of fp32")


def transformer_engine_attention(size: Sizes, bounds: Tensor, longest: int) -> Callable[..., Tensor]:
    """Its attention over a packed row, as Megatron calls it."""
    from transformer_engine.pytorch import DotProductAttention

    core = DotProductAttention(
        size.heads,
        size.head_size,
        num_gqa_groups=size.kv_heads,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal",
    )

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return core(
            query,
            key,
            value,
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            attn_mask_type="padding_causal",
        ).flatten(1)

    return attend


# ---- the same as transformers


def parity(report: Report, size: Sizes) -> None:
    """The actor's log-probs, entropies, loss and gradients against transformers' on the CPU, every family."""
    from nemo_jepo.actor import parallel

    parallel.init_distributed()
    from tests.distributed import scoring_jobs, test_against_transformers
    from tests.support.hf_models import random_model, save

    by_transformers = test_against_transformers.by_transformers
    weights = test_against_transformers.token_weights()
    with tempfile.TemporaryDirectory() as folder:
        for family in size.families:
            model = random_model(f"{family} untied")
            job = {"folder": save(model, Path(folder) / family), "model": {}, "precision": "fp32"}
            given = [weights[str(number)] for number in range(len(weights))]
            expected = by_transformers(model, weights)
            rounded = by_transformers(random_model(f"{family} untied").bfloat16(), weights)
            with local_layers():  # no packed attention of Transformer Engine computes in fp32
                found = scoring_jobs.scores_and_gradients(job | {"token_weights": given})
            in_bf16 = scoring_jobs.scores_and_gradients(job | {"precision": "bf16", "token_weights": None})
            names = [name for name in expected if name.startswith("logprob/")]
            gradients = [name for name in expected if name.startswith("grad/")]
            difference = {
                "fp32 log-probs, largest, nats": max(
                    (found[name] - expected[name]).abs().max().item() for name in names if expected[name].numel()
                ),
                "fp32 loss, relative": abs(float(found["loss"] / expected["loss"]) - 1),
                "fp32 gradients, largest relative": max(relative_error(found[n], expected[n]) for n in gradients),
            }
            errors = {
                "bf16 log-probs, RMS, nats": root_mean_square(in_bf16, expected, names),
                "transformers' own in bf16": root_mean_square(rounded, expected, names),
            }
            report[family] = difference | errors
            own, usual = errors.values()
            report.expect(difference["fp32 log-probs, largest, nats"] < 1e-4, f"{family}: fp32 log-probs agree")
            report.expect(difference["fp32 gradients, largest relative"] < 1e-3, f"{family}: fp32 gradients agree")
            report.expect(0 < own < 1.5 * usual, f"{family}: bf16 rounds at most 1.5 times as much as transformers")


def root_mean_square(found: dict[str, Tensor], exact: dict[str, Tensor], names: Sequence[str]) -> float:
    """Of all differences together."""
    return torch.cat([found[name] - exact[name] for name in names]).square().mean().sqrt().item()


def suite(report: Report, size: Sizes, files: Sequence[str], expression: str = "") -> None:
    """Tests of this folder, by pytest."""
    if not GPU:
        raise Skip("these tests need a GPU")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={folder}/tests.xml"]
        command += [f"tests/gpu/{name}" for name in files] + (["-k", expression] if expression else [])
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if not Path(folder, "tests.xml").exists():
            raise RuntimeError(ended.stdout[-2000:] + ended.stderr[-2000:])
        cases = list(ElementTree.parse(f"{folder}/tests.xml").iter("testcase"))
    outcome: Counter[str] = Counter()
    for case in cases:
        bad = [kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None]
        outcome[bad[0] if bad else "passed"] += 1
        if bad and bad[0] != "skipped":
            element = case.find(bad[0])
            lines = (element.text or "").strip().splitlines() if element is not None else []
            report.faults.append(f"{case.get('name')}: {' | '.join(lines[-6:])[:600]}")
    report["tests"] = dict(outcome)
    if outcome["skipped"] and len(outcome) == 1:
        raise Skip("every test was skipped")


# ---- weights on their way to a server


def race(report: Report, size: Sizes) -> None:
    """vLLM packs on streams of its own: are the weights written by then, and kept until they are read?

    Each tensor is filled behind a long wait on the caller's stream. With the event and the allocator's note left out
    the same program must go wrong, or this check proves nothing.
    """
    path = packed_tensor_file()
    if path is None:
        raise Skip("vLLM is not installed")
    if not GPU:
        raise Skip("needs a GPU")
    spec = importlib.util.spec_from_file_location("packed_tensor", path)
    assert spec is not None and spec.loader is not None
    packed = importlib.util.module_from_spec(spec)
    sys.modules["packed_tensor"] = packed
    spec.loader.exec_module(packed)
    from nemo_jepo.rollout.vllm import push

    right = push_through(packed.packed_nccl_broadcast_producer, size)
    with mock.patch.object(push.Item, "on_this_stream", lambda item: (item.name, item.tensor)):
        wrong = push_through(packed.packed_nccl_broadcast_producer, size)
    report["tensors"] = size.race_tensors
    report["damaged"] = right
    report["damaged without waiting"] = wrong
    report.expect(right == 0, "every tensor arrives whole")
    report.expect(wrong > 0, "without waiting some arrive damaged")


def packed_tensor_file() -> Path | None:
    """vLLM's module that packs weights; PACKED_TENSOR_FILE names a copy of it."""
    if "PACKED_TENSOR_FILE" in os.environ:
        return Path(os.environ["PACKED_TENSOR_FILE"])
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "distributed/weight_transfer/packed_tensor.py"


def push_through(producer: Callable[..., None], size: Sizes) -> int:
    """How many tensors of one push arrive damaged, over vLLM's producer and a group that keeps what it is sent."""
    from nemo_jepo.config.schema import VLLMConfig
    from nemo_jepo.rollout.vllm import push

    received: list[Tensor] = []

    class Group:
        """Takes what is broadcast when the stream has come that far."""

        def broadcast(self, tensor: Tensor, src: int) -> None:
            received.append(tensor.clone())

    class Channel:
        """A server."""

        def __init__(self, *_: Any) -> None: ...

        def send(self, tensors: Any, version: int) -> None:
            producer(iter(tensors), Group(), 0, lambda item: item[1], buffer_size_bytes=8 * size.race_elements)

        def missing(self, num_sent: int) -> str:
            return ""

    def stream() -> Iterator[tuple[str, Tensor]]:
        for number in range(size.race_tensors):
            tensor = torch.empty(size.race_elements, device=DEVICE)
            tensor.fill_(-1.0)
            torch.cuda._sleep(20_000_000)  # type: ignore[attr-defined]  # cycles: about 10 ms
            yield str(number), tensor.fill_(float(number))
            del tensor  # its memory may serve the next one

    names = [(str(number), (size.race_elements,)) for number in range(size.race_tensors)]
    with mock.patch.object(push, "NCCLChannel", Channel), tempfile.TemporaryDirectory() as folder:
        settings = VLLMConfig(weight_transfer="nccl")
        transfer = push.WeightTransfer(lambda *_, **__: {"success": True}, settings, names, torch.float32, Path(folder))
        faults = transfer.push(["http://server"], stream(), 1)
    assert faults == {"http://server": None}, faults
    torch.cuda.synchronize()
    values = torch.cat(received).view(torch.float32).view(size.race_tensors, -1)
    expected = torch.arange(size.race_tensors, device=values.device, dtype=torch.float32)[:, None]
    return int((values != expected).any(1).sum())


# ---- updates


class DeviceWeights:
    """Random weights that are drawn on the device: a host would take a minute for a shape of 8B."""

    def __init__(self, hf_config: Any) -> None:
        from nemo_jepo.actor.weights.load import hf_shapes

        self._shapes, self._range = hf_shapes(hf_config), hf_config.initializer_range

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """The whole tensor, or tensor[start:stop] along dim."""
        draw = torch.Generator(DEVICE).manual_seed(len(name) * 1000 + sum(name.encode()))
        if name.endswith("norm.weight"):
            tensor = torch.ones(self._shapes[name], device=DEVICE)
        else:
            tensor = torch.randn(self._shapes[name], generator=draw, device=DEVICE) * self._range
        return tensor if dim is None else tensor.narrow(dim, start, stop - start)


def shape_of(size: Sizes, layers: int) -> dict[str, Any]:
    """Llama 3.1 8B with fewer layers, or a toy on a CPU."""
    from benchmarks import h100

    return h100.MODELS["8b_shape"] | ({} if GPU else h100.TOY) | {"num_hidden_layers": layers}


def build_actor(shape: dict[str, Any], tokens: int, **settings: Any) -> Any:
    """A policy in bf16 that is ready to train."""
    from nemo_jepo.actor import parallel

    parallel.init_distributed()
    from nemo_jepo.actor.actor import MegatronJEPOActor
    from nemo_jepo.actor.model import load_hf_config
    from nemo_jepo.actor.weights.load import load_stage
    from nemo_jepo.config.schema import ModelConfig, OptimConfig

    model = ModelConfig(tokens_per_micro_batch=tokens, **settings)
    parallel.init_model_parallel(model)
    layout, hf_config = parallel.Layout(), load_hf_config(shape)
    actor = MegatronJEPOActor(hf_config, model, "bf16", layout)
    load_stage(actor.chunks, hf_config, DeviceWeights(hf_config), layout)
    actor.start_training(OptimConfig(lr=1e-5), 1.0, 1000)
    return actor


def batch_of(size: Sizes, tokens: int) -> list[Any]:
    """The sequences that every update reads."""
    from benchmarks import h100

    prompt, chain, answer = size.lengths
    return h100.batch_of(
        h100.Size(
            prompts=size.prompts,
            generations=size.generations,
            tokens_per_row=tokens,
            prompt_tokens=prompt,
            chain_tokens=chain,
            answer_tokens=answer,
        )
    )


def measure_updates(report: Report, size: Sizes, layers: int, rows_of: Sequence[int], **settings: Any) -> None:
    """Scoring and updates of the shape over rows of some sizes, and a profile of an update of two rows."""
    from benchmarks import h100
    from nemo_jepo.data.packing import pack

    shape = shape_of(size, layers)
    begin = perf_counter()
    actor = build_actor(shape, max(rows_of), **settings)
    synchronize()
    report["build_seconds"] = perf_counter() - begin
    report["parameters"] = sum(p.numel() for chunk in actor.chunks for p in chunk.parameters())
    report["layers"] = type(actor.chunks[0].decoder.layers[0].self_attention.core_attention).__name__
    sequences = batch_of(size, min(rows_of))
    weights = h100.mean_nll_weights(sequences)
    tokens, flops = sum(s.length for s in sequences), h100.model_flops(shape, sequences)
    report["tokens"], report["model_tflop"] = tokens, flops / 1e12
    for length in rows_of:
        rows = pack(sequences, length)
        score = partial(actor.get_inference_log_probs, rows, len(sequences))
        score()
        losses = [actor.train_step(rows, weights)["loss"]]
        reset_peak()
        scoring = seconds_of(score)
        update = seconds_of(
            lambda rows=rows, losses=losses: losses.append(actor.train_step(rows, weights)["loss"]), size.updates
        )
        found = {
            "rows": len(rows),
            "scoring_seconds": scoring,
            "update_seconds": update,
            "update_tokens_per_second": tokens / update,
            "update_tflops": flops / update / 1e12,
            "mfu": flops / update / 1e12 / PEAK_TFLOPS,
            "scoring_share_of_peak": flops / 3 / scoring / 1e12 / PEAK_TFLOPS,
            "peak_gib": peak_gib(),
            "losses": losses,
        }
        few, few_weights = rows[:2], h100.mean_nll_weights(sequences)

        def gradients(few: Sequence[Any] = few, few_weights: Sequence[Tensor] = few_weights) -> None:
            actor.prepare_for_training_step()
            actor.get_loss_and_metrics(few, few_weights)

        waited = waits(gradients)
        per_layer = sum(waited.values()) / (layers * len(few))
        report[f"rows of {length}"] = found | {
            "waits_per_layer_and_row": per_layer,
            "waits of two rows": waited,
            "waits of the optimizer": waits(actor.finish_training_step),
            "profile of two rows": profile(gradients),
            "profile of the optimizer": profile(actor.finish_training_step),
        }
        report.expect(losses[-1] < losses[0], f"rows of {length}: the loss falls")
        report.expect(not GPU or per_layer < 1, f"rows of {length}: less than one wait for the GPU a layer")


def most_layers(size: Sizes) -> int:
    """Twice as many where there is twice the memory: at 18 bytes a parameter 16 layers take 76 GiB."""
    return (
        2 * size.more_layers
        if GPU and torch.cuda.get_device_properties(0).total_memory > 120 * 2**30
        else size.more_layers
    )


def updates(report: Report, size: Sizes) -> None:
    """Updates of the 8B shape with few layers."""
    measure_updates(report, size, size.layers, size.rows)


def updates_more_layers(report: Report, size: Sizes) -> None:
    """The same with more layers: the difference is what layers cost, without output head and embedding."""
    measure_updates(report, size, most_layers(size), size.rows[-1:])


def updates_fp8(report: Report, size: Sizes, recipe: str) -> None:
    """The same in FP8."""
    require_transformer_engine()
    measure_updates(report, size, most_layers(size), size.rows[-1:], fp8="hybrid", fp8_recipe=recipe)


def updates_local(report: Report, size: Sizes) -> None:
    """The same with local layers where Transformer Engine is installed."""
    require_transformer_engine()
    with local_layers():
        measure_updates(report, size, size.layers, size.rows[-1:])


def plain_transformers(report: Report, size: Sizes) -> None:
    """What a plain step of transformers does with the same shape and sequences: padded batches, whole logits.

    bf16 weights and AdamW states, SDPA attention, logits of every token, log-softmax in fp32 a sequence at a time: a
    policy-gradient step as TRL has it. It keeps no fp32 main weights and no fp32 gradients, so it needs less memory.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from benchmarks import h100

    shape = dict(shape_of(size, size.layers))
    sequences = batch_of(size, min(size.rows))
    tokens, flops = sum(s.length for s in sequences), h100.model_flops(shape, sequences)
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=GPU)
    scored = sum(s.chain_length + s.answer_length for s in sequences)

    def step(each: int) -> float:
        loss = 0.0
        for start in range(0, len(sequences), each):
            part = sequences[start : start + each]
            longest = max(s.length for s in part)
            ids = torch.tensor([[*s.token_ids, *[0] * (longest - s.length)] for s in part], device=DEVICE)
            mask = torch.tensor([[1] * s.length + [0] * (longest - s.length) for s in part], device=DEVICE)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            total = torch.zeros((), device=DEVICE)
            for number, s in enumerate(part):
                own = slice(s.prompt_length - 1, s.length - 1)
                log_p = logits[number, own].float().log_softmax(-1)
                total = total - log_p.gather(1, ids[number, s.prompt_length : s.length, None]).sum()
            (total / scored).backward()
            loss += float(total.detach()) / scored
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    for each in (2, 4):
        try:
            losses = [step(each)]
            reset_peak()
            seconds = seconds_of(lambda each=each, losses=losses: losses.append(step(each)), size.updates)
        except torch.OutOfMemoryError as error:
            report[f"{each} sequences a batch"] = str(error).splitlines()[0]
            continue
        report[f"{each} sequences a batch"] = {
            "update_seconds": seconds,
            "update_tokens_per_second": tokens / seconds,
            "mfu": flops / seconds / 1e12 / PEAK_TFLOPS,
            "peak_gib": peak_gib(),
            "losses": losses,
        }


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


# ---- checkpoints between kinds of layers


def cpu_checkpoint(report: Report, size: Sizes) -> None:
    """A checkpoint that a CPU wrote, with local layers, is read here into whatever layers serve, and back."""
    from nemo_jepo.actor import parallel

    parallel.init_distributed()
    from nemo_jepo.actor.actor import MegatronJEPOActor
    from nemo_jepo.actor.model import load_hf_config
    from nemo_jepo.actor.weights.load import load_stage, open_source
    from nemo_jepo.actor.weights.stream import weight_stream
    from nemo_jepo.checkpoint.format import latest_checkpoint
    from nemo_jepo.checkpoint.writer import CheckpointWriter, RunState, load_checkpoint
    from nemo_jepo.config.schema import ModelConfig
    from tests.support.hf_models import random_model, save

    def command(*words: str) -> None:
        ended = subprocess.run(
            [sys.executable, "-m", "nemo_jepo.cli", *words],
            cwd=ROOT,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
        )
        if ended.returncode:
            raise RuntimeError((ended.stdout + ended.stderr)[-2500:])

    def actor_of(folder: str) -> Any:
        model = ModelConfig(tokens_per_micro_batch=256)
        parallel.init_model_parallel(model)
        return MegatronJEPOActor(load_hf_config(folder), model, "bf16", parallel.Layout())

    def same(actor: Any, folder: str) -> bool:
        other = actor_of(folder)
        load_stage(other.chunks, other.hf_config, open_source(other.hf_config, folder, 0), other.layout)
        pairs = zip(
            *(dict(weight_stream(a.chunks, a.hf_config, a.layout)).items() for a in (actor, other)), strict=True
        )
        return all(name == other_name and torch.equal(own, its) for (name, own), (other_name, its) in pairs)

    for family in size.crossing:
        with tempfile.TemporaryDirectory() as root:
            folder = save(random_model(f"{family} untied").bfloat16(), Path(root) / "hf")
            command("import", folder, f"{root}/imported")
            actor = actor_of(folder)
            path = next(Path(root, "imported").glob("**/complete.json")).parent
            actor.load_weights(load_checkpoint(path, {"model": actor.sharded_weights()}).sharded["model"])
            here = type(actor.chunks[0].decoder.layers[0].self_attention.core_attention).__name__
            report[family] = {"attention here": here, "weights of the CPU's checkpoint": same(actor, folder)}
            report.expect(report[family]["weights of the CPU's checkpoint"], f"{family}: a CPU's checkpoint is read")
            writer = CheckpointWriter(Path(root) / "own", 1, actor.hf_config.save_pretrained)
            writer.save(1, lambda actor=actor: RunState({"model": actor.sharded_weights()}, {}), last=True)
            command("export", str(latest_checkpoint(Path(root) / "own")), f"{root}/exported")
            report[family]["weights of the CPU's export"] = same(actor, f"{root}/exported")
            report.expect(report[family]["weights of the CPU's export"], f"{family}: a CPU exports this checkpoint")


# ---- whole runs


def run(report: Report, size: Sizes) -> None:
    """JEPO as a user starts it: warm-up, sampling by the embedded sampler, updates, checkpoint, and on from there."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            *("--config-name", "demo", "trainer.precision=bf16"),
            *(f"exp_manager.exp_dir={folder}", "exp_manager.name=run", "exp_manager.create_tensorboard_logger=false"),
            *(
                f"warmup.max_steps={size.warmup_steps}",
                "trainer.jepo.save_interval=1",
                "trainer.jepo.val_at_start=false",
            ),
            *("trainer.jepo.val_check_interval=0", f"data.arithmetic.num_validation={size.validation}"),
            *(f"trainer.jepo.num_prompts_per_step={size.run_prompts}", "data.arithmetic.num_train=2000"),
        ]
        for steps in (size.run_steps, size.run_steps + 1):
            command = [sys.executable, "-m", "nemo_jepo.cli", "train", *settings, f"trainer.jepo.max_steps={steps}"]
            begin = perf_counter()
            ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            report[f"seconds to step {steps}"] = perf_counter() - begin
            if ended.returncode:
                raise RuntimeError(f"exit code {ended.returncode}\n{(ended.stdout + ended.stderr)[-3000:]}")
        lines = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
    last = lines[-1]
    shown = ("step", "val_rollouts/proxy_nll", "val_rollouts/accuracy", "train_optim/loss", "train_optim/grad_norm")
    more = ("train_rollouts/logprob_difference", "train_rollouts/valid_rate", "timing/step_time", "timing/generate")
    report["last line"] = {name: last[name] for name in (*shown, *more) if name in last}
    report["metrics"] = {name: value for name, value in last.items() if "logprob_diff" in name or "timing" in name}
    report.expect(last["step"] == size.run_steps + 1, "the run goes on from its checkpoint")


def vllm_round_trip(report: Report, size: Sizes) -> None:
    """A vLLM server on the trainer's GPU."""
    if importlib.util.find_spec("vllm") is None:
        raise Skip("vLLM is not installed")
    suite(report, size, ["test_vllm.py"])


CHECKS: dict[str, Callable[[Report, Sizes], None]] = {
    "versions": versions,
    "parity": parity,
    "small_updates": partial(suite, files=["test_updates.py", "test_against_transformers.py"]),
    "actor": partial(suite, files=["test_actor.py"], expression="not fp8"),
    "actor_fp8": partial(suite, files=["test_actor.py"], expression="fp8"),
    "cpu_checkpoint": cpu_checkpoint,
    "race": race,
    "run": run,
    "ceilings": ceilings,
    "attention": attention,
    "updates": updates,
    "logprob_head": logprob_head,
    "plain_transformers": plain_transformers,
    "updates_more_layers": updates_more_layers,
    "updates_local": updates_local,
    "updates_fp8_tensorwise": partial(updates_fp8, recipe="tensorwise"),
    "updates_fp8_blockwise": partial(updates_fp8, recipe="blockwise"),
    "vllm": vllm_round_trip,
}


def out_of_time(number: int, frame: Any) -> None:
    """What has been measured so far is still written."""
    raise TimeoutError("took longer than it may")


def main(name: str, out: Path, size: Sizes) -> None:
    """Run one check and write what came out."""
    report, status, reason = Report(), "passed", ""
    begin = perf_counter()
    signal.signal(signal.SIGTERM, out_of_time)
    try:
        CHECKS[name](report, size)
    except Skip as skip:
        status, reason = "skipped", str(skip)
    except Exception:
        status, reason = "failed", traceback.format_exc()[-4000:]
    if report.faults:
        status = "failed"
    found = {"status": status, "reason": reason, "faults": report.faults, "seconds": perf_counter() - begin}
    out.write_text(json.dumps(found | {"found": report}, default=str))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Sizes.dry() if "--dry-run" in sys.argv else Sizes())
