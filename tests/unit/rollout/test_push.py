"""A weight push to several servers, one of which stands still."""

import threading
import time
from collections.abc import Iterable
from typing import Any

import torch

from nemo_jepo.config.schema import VLLMConfig
from nemo_jepo.rollout.vllm.channels import Channel, NamedTensor
from nemo_jepo.rollout.vllm.push import WeightTransfer

SHAPES = [(f"layer.{number}", (2,)) for number in range(12)]
TIMEOUT_S = 4.0


class Connection:
    """A server that takes tensors; the one that stands still takes three, the other works on after the last one."""

    def __init__(self, stands_still: bool, the_end: threading.Event) -> None:
        self.taken: list[str] = []
        self._stands_still, self._the_end = stands_still, the_end

    def send(self, tensors: Iterable[NamedTensor], version: int) -> None:
        for name, _ in tensors:
            if self._stands_still and len(self.taken) == 3:
                self._the_end.wait()
            self.taken.append(name)
        time.sleep(TIMEOUT_S / 8)

    def missing(self, num_sent: int) -> str:
        return "missing rank 1"


class Transfer(WeightTransfer):
    """With connections of ours."""

    connections: dict[str, Connection]

    def _open(self, url: str) -> Channel:
        return self.connections[url]


def control(url: str, method: str, route: str, *_: Any, **__: Any) -> dict[str, Any]:
    """Every route of every server says yes."""
    return {"success": True}


def test_a_server_that_stands_still_costs_the_others_none_of_their_time(tmp_path):
    """The stream waits for it until the deadline; the other two still need a part of theirs."""
    the_end = threading.Event()
    settings = VLLMConfig(sync_timeout_s=TIMEOUT_S, weight_transfer="gloo")
    transfer = Transfer(control, settings, SHAPES, torch.float32, tmp_path)
    transfer.connections = {url: Connection(url == "b", the_end) for url in "abc"}
    try:
        faults = transfer.push("abc", ((name, torch.zeros(shape)) for name, shape in SHAPES), version=1)
    finally:
        the_end.set()
    assert faults["a"] is None and faults["c"] is None
    assert faults["b"] == (
        "no weight sync within rollout.vllm.sync_timeout_s. Sent 4 of 12 tensors, the last layer.3; missing rank 1"
    )
    for url in "ac":
        assert transfer.connections[url].taken == [name for name, _ in SHAPES]
