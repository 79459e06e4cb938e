"""The machine: versions, and what its arithmetic and memory can do at most."""

import importlib.metadata
import importlib.util
import os
import platform
import subprocess

import torch

from tests.gpu.checks.common import DEVICE, GPU, PEAK_TFLOPS, Report, Sizes, Skip, seconds_of


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
