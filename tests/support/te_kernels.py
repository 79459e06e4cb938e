"""Stands in for `transformer_engine_torch`, the compiled half of Transformer Engine 2.11: its names, without kernels.

The other half, which is Python, builds layers and recipes with these; what would compute raises.
"""

from enum import IntEnum
from typing import Any

FP8FwdTensors = IntEnum(
    "FP8FwdTensors", [f"GEMM{n}_{role}" for n in (1, 2, 3) for role in ("INPUT", "WEIGHT", "OUTPUT")], start=0
)
FP8BwdTensors = IntEnum(
    "FP8BwdTensors", [f"GRAD_{role}{n}" for n in (1, 2, 3) for role in ("OUTPUT", "INPUT")], start=0
)
NVTE_Fused_Attn_Backend = IntEnum(
    "NVTE_Fused_Attn_Backend",
    ["NVTE_No_Backend", "NVTE_F16_max512_seqlen", "NVTE_F16_arbitrary_seqlen", "NVTE_FP8"],
    start=-1,
)


def get_cublasLt_version() -> int:
    """CUDA 13's: new enough for every FP8 recipe."""
    return 130000


def get_cudnn_version() -> int:
    """9.20: new enough for every kernel that the actor asks for."""
    return 92000


class _AnyMember(type):
    """A class that has any member: the member's name."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


def __getattr__(name: str) -> Any:
    """A class for a capital name, always the same one; else a kernel that raises."""
    if name.startswith("__"):
        raise AttributeError(name)
    if name[0].isupper():
        return globals().setdefault(name, _AnyMember(name, (), {}))

    def kernel(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{name} is a kernel of Transformer Engine and needs a GPU")

    return kernel
