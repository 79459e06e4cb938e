"""The GPU kinds that the planner knows, as their makers describe them. Bytes, seconds, FLOP.

Peaks are dense, without sparsity, and bandwidths are for one direction: datasheets print twice of either. What software
really gets of them is in calibration.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from nemo_jepo.config.errors import ConfigError

GIB = 2**30
TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True, slots=True)
class GPU:
    """One GPU and its way to the others, in a node of the maker's reference design (one network card a GPU)."""

    name: str
    memory: float
    """Bytes that CUDA reports: what PyTorch prints as "total capacity" when memory runs out."""
    bf16_flops: float
    """FLOP/s of the tensor cores, dense."""
    fp8_flops: float | None
    """The same in FP8; None where there is none."""
    memory_bandwidth: float
    """Bytes/s of the GPU's own memory."""
    nvlink_bandwidth: float
    """Bytes/s to the other GPUs of the node, one direction."""
    network_bandwidth: float
    """Bytes/s to other nodes, one direction, for each GPU."""
    host_bandwidth: float
    """Bytes/s to host memory over PCIe, one direction."""
    source: str

    def matmul_peak(self, fp8: bool) -> float:
        """FLOP/s at which its matrix products cannot be beaten.

        Raises:
            ConfigError: FP8 on a GPU without it.
        """
        if not fp8:
            return self.bf16_flops
        if self.fp8_flops is None:
            raise ConfigError("model.fp8", "set", f"{self.name} has no FP8", "Set it to null, or choose another --gpu")
        return self.fp8_flops


GPUS: Mapping[str, GPU] = {
    "h100": GPU(
        "H100 SXM 80GB", 79.1 * GIB, 989 * TERA, 1979 * TERA, 3.35 * TERA, 450 * GIGA, 50 * GIGA, 64 * GIGA,
        "NVIDIA H100 datasheet, SXM column (with sparsity 1,979 and 3,958); DGX H100: 8 x 400 Gbit/s",
    ),
    "h200": GPU(
        "H200 SXM 141GB", 139.8 * GIB, 989 * TERA, 1979 * TERA, 4.8 * TERA, 450 * GIGA, 50 * GIGA, 64 * GIGA,
        "NVIDIA H200 datasheet, SXM column; DGX H200: 8 x 400 Gbit/s",
    ),
    "a100": GPU(
        "A100 SXM 80GB", 79.1 * GIB, 312 * TERA, None, 2.039 * TERA, 300 * GIGA, 25 * GIGA, 32 * GIGA,
        "NVIDIA A100 datasheet, 80GB SXM column; DGX A100: 8 x 200 Gbit/s",
    ),
    "b200": GPU(
        "B200 180GB", 178.3 * GIB, 2250 * TERA, 4500 * TERA, 8.0 * TERA, 900 * GIGA, 50 * GIGA, 64 * GIGA,
        "NVIDIA DGX B200 datasheet, divided by its 8 GPUs; 8 x 400 Gbit/s",
    ),
}  # fmt: skip


def gpu_named(name: str) -> GPU:
    """The GPU of that name.

    Raises:
        ConfigError: an unknown one.
    """
    if name.lower() not in GPUS:
        raise ConfigError("--gpu", name, f"known are {', '.join(GPUS)}", "Choose one of these")
    return GPUS[name.lower()]
