"""Weights on their way to a server: vLLM's packing, with tensors that are still being written."""

import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.gpu.checks.common import DEVICE, GPU, Report, Sizes, Skip


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
    from nemo_jepo.rollout.vllm.fleet import Fleet

    received: list[Tensor] = []

    class Group:
        """Takes what is broadcast when the stream has come that far."""

        def broadcast(self, tensor: Tensor, src: int) -> None:
            received.append(tensor.clone())

    class Channel:
        """A server."""

        updates: dict[str, Any] = {}

        def __init__(self, fleet: Fleet, *_: Any) -> None:
            self.urls = fleet.urls

        def send(self, tensors: Any, version: int, remaining_s: Any) -> None:
            producer(iter(tensors), Group(), 0, lambda item: item[1], buffer_size_bytes=8 * size.race_elements)

        def is_open(self, timeout_s: float) -> bool:
            return True

        def close(self) -> None: ...

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
        pushed = transfer.push(["http://server"], stream(), 1)
    assert pushed == push.Pushed(updated=("http://server",)), pushed
    torch.cuda.synchronize()
    values = torch.cat(received).view(torch.float32).view(size.race_tensors, -1)
    expected = torch.arange(size.race_tensors, device=values.device, dtype=torch.float32)[:, None]
    return int((values != expected).any(1).sum())
