"""What the checks share: sizes, reports, clocks, profiles."""

import statistics
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[3]
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
    prompt_segments: tuple[int, ...] = (-1, 0, 0, -1, 3, 3, 3)
    """The segment whose keys each of them sees too; -1: none."""
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
    head: tuple[int, int, int] = (4096, 4096, 128_256)
    chunks: tuple[int, ...] = (384, 2048)
    race_tensors: int = 40
    race_elements: int = 1 << 22
    run_steps: int = 3
    run_prompts: int = 32
    warmup_steps: int = 150
    validation: int = 64
    layout_cases: int = 3
    layouts: int = 100

    @classmethod
    def dry(cls) -> "Sizes":
        """The same for a CPU, in seconds."""
        return cls(
            matrix=128,
            copied_bytes=1 << 20,
            segments=(20, 12, 7, 1),
            prompt_segments=(-1, 0, 0, -1),
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
            layout_cases=1,
            layouts=1,
        )


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
