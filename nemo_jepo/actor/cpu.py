"""The gloo shim: lets megatron-core 0.16.1 train on CPU tensors, so that CI runs the code that runs on H100s.

Megatron-core asks torch.cuda for a device, a random state and a synchronisation in a handful of places even when
every tensor is on the host. Each patch below answers one such question and names the first symbol that asks it.
No Megatron source is edited, and nothing is patched where CUDA is available.
"""

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_CPU = torch.device("cpu")
_installed = False


def _on_host(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A tensor factory that answers device="cuda" with a host tensor and ignores pin_memory."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Tensor:
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def _patch_device() -> None:
    """_ParamAndGradBuffer, schedules.forward_step, MegatronOptimizer; `cuda`: LanguageModule's tied embedding."""
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda device=None: None
    with torch.device("cpu"):  # torch remembers which functions it gives a device to: these, not their stand-ins
        torch.empty(0)
    for name in ("tensor", "zeros", "ones", "empty", "empty_like"):
        setattr(torch, name, _on_host(getattr(torch, name)))


def _patch_random_state() -> None:
    """tensor_parallel.random.CudaRNGStatesTracker keeps one random state per name; here it is the host's."""
    from megatron.core.tensor_parallel import random

    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)  # type: ignore[assignment]
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    logging.getLogger(random.__name__).setLevel(logging.ERROR)  # "CPU RNG state changed within GPU RNG context"


def _patch_tensor_type() -> None:
    """clip_grads.clip_grad_by_total_norm_fp32 and DistributedOptimizer check for torch.cuda.FloatTensor."""
    original = torch.Tensor.type

    def type_(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(self, *args, **kwargs)
        return original(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_  # type: ignore[method-assign,assignment]


class _NoEvent:
    """torch.cuda.Event: work on the host is done when its call returns."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, stream: object = None) -> None:
        pass

    wait = record

    def synchronize(self) -> None:
        pass


class _NoStream(_NoEvent):
    """torch.cuda.Stream; a class, because transformers evaluates `torch.cuda.Stream | None` at import."""

    def wait_stream(self, stream: object) -> None:
        pass

    wait_event = wait_stream

    def record_event(self, event: object = None) -> _NoEvent:
        return _NoEvent()


def _patch_streams() -> None:
    """MoEAlltoAllTokenDispatcher: `side stream` of its copies to the host."""
    torch.cuda.Stream, torch.cuda.Event = _NoStream, _NoEvent  # type: ignore[misc,assignment]
    torch.cuda.current_stream = lambda device=None: _NoStream()  # type: ignore[assignment,return-value]
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment,return-value]
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign,assignment]


def _patch_experts() -> None:
    """MoEAlltoAllTokenDispatcher: all_to_all wants lengths as numbers."""
    from megatron.core.transformer.moe import token_dispatcher

    def on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = on_host


def install() -> None:
    """Patch torch and megatron-core for CPU tensors; a second call does nothing.

    Raises:
        RuntimeError: CUDA is available, where the patches would break real GPU work.
    """
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        raise RuntimeError("the gloo shim is for machines without CUDA")
    _patch_device()
    _patch_random_state()
    _patch_tensor_type()
    _patch_streams()
    _patch_experts()
    _installed = True
