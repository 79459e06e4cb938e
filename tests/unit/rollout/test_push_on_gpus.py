"""A weight push on a trainer's GPU: the device of its threads, and the streams that write and read a tensor.

CUDA is emulated: a device for each host thread, 0 in a new one, and streams that are lists of what they were told.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch

from nemo_jepo.config.schema import VLLMConfig
from nemo_jepo.rollout.vllm import push
from nemo_jepo.rollout.vllm.channels import NamedTensor
from nemo_jepo.rollout.vllm.fleet import Fleet, in_thread

SHAPES = [(f"layer.{number}", (2,)) for number in range(4)]
GPU = 4


class Stream:
    """What a stream was told, in order."""

    def __init__(self) -> None:
        self.told: list[tuple[str, object]] = []

    def wait_event(self, event: "Event") -> None:
        self.told.append(("wait", event.after))


class Cuda:
    """Devices and streams of host threads."""

    def __init__(self) -> None:
        self._of_thread = threading.local()
        self.default = Stream()

    def current_device(self) -> int:
        return getattr(self._of_thread, "device", 0)

    def set_device(self, device: int) -> None:
        self._of_thread.device = device

    def current_stream(self) -> Stream:
        return getattr(self._of_thread, "stream", self.default)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self._of_thread.stream = stream
        yield
        self._of_thread.stream = self.default


class Event:
    """Remembers what the stream had been told when it was recorded."""

    cuda: Cuda

    def record(self) -> None:
        self.after = self.cuda.current_stream().told[-1]


class Group:
    """Packs on a stream of its own, as vLLM's trainer does."""

    opened: list["Group"] = []
    cuda: Cuda
    updates: dict[str, object] = {}

    def __init__(self, fleet: Fleet, *_: object) -> None:
        self.urls = fleet.urls
        self.devices = [self.cuda.current_device()]
        self.side = Stream()
        self.opened.append(self)

    def is_open(self, timeout_s: float) -> bool:
        return True

    def send(self, tensors: Iterable[NamedTensor], version: int, remaining_s: object) -> None:
        self.devices.append(self.cuda.current_device())
        stream = iter(tensors)
        with self.cuda.stream(self.side):
            while (item := next(stream, None)) is not None:
                self.side.told.append(("pack", item[0]))


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    """A trainer on GPU 4."""
    cuda = Cuda()
    Event.cuda = Group.cuda = cuda
    Group.opened = []
    cuda.set_device(GPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("current_device", "set_device", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: stream.told.append(("keeps", len(tensor))), raising=False
    )
    monkeypatch.setattr(push, "NCCLChannel", Group)
    return cuda


def weights(cuda: Cuda) -> Iterator[NamedTensor]:
    for name, shape in SHAPES:
        cuda.current_stream().told.append(("write", name))
        yield name, torch.zeros(shape)


def pushed(cuda: Cuda, folder, times: int) -> list[Group]:
    settings = VLLMConfig(weight_transfer="nccl")
    transfer = push.WeightTransfer(lambda *_, **__: {"success": True}, settings, SHAPES, torch.bfloat16, folder)
    for version in range(times):
        urls = ("http://a", "http://b")
        assert transfer.push(urls, weights(cuda), version) == push.Pushed(updated=urls)
    return Group.opened


def test_every_push_runs_on_the_trainers_gpu(cuda, tmp_path):
    """A push has threads of its own, and a thread begins on device 0."""
    for group in pushed(cuda, tmp_path, times=3):
        assert group.devices == [GPU] * 4


def test_the_sending_stream_waits_for_a_tensor_and_keeps_its_memory(cuda, tmp_path):
    """Else it packs what another stream has not written yet, or what is written over meanwhile."""
    for group in pushed(cuda, tmp_path, times=1):
        expected = []
        for name, shape in SHAPES:
            expected += [("wait", ("write", name)), ("keeps", shape[0]), ("pack", name)]
        assert group.side.told == expected


def test_whatever_else_is_begun_in_a_thread_has_the_trainers_gpu(cuda):
    """A group over NCCL is opened in one."""
    assert in_thread(torch.cuda.current_device).result() == GPU
