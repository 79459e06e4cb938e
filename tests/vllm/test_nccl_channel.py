"""The trainer's end of a push over NCCL: vLLM's own trainer engine, over a communicator that notes what it is sent.

NCCL itself needs GPUs (tests/gpu); here is what the servers are told, in which order, and what a lost one sets off.
"""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nemo_jepo.rollout.vllm import gloo
from nemo_jepo.rollout.vllm.channels import NCCL_BUFFER_BYTES, NCCLChannel
from nemo_jepo.rollout.vllm.fleet import Fleet
from tests.support.vllm_processes import needs_vllm

pytestmark = needs_vllm

SIZES = {"http://127.0.0.1:1": 2, "http://127.0.0.1:2": 4, "http://127.0.0.1:3": 1}
SHAPES = [("a", (2, 3)), ("b", (4,))]


class Servers:
    """Their routes. An update lasts until `over` is set; a lost server's ends at once, with an error."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, Any]] = []
        self.over = threading.Event()
        self.lost: str | None = None

    def __call__(self, url: str, method: str, route: str, body: Any = None, **_: Any) -> dict[str, Any]:
        self.calls.append((url, route, body))
        if route == "/get_world_size":
            return {"world_size": SIZES[url]}
        if route == "/update_weights":
            if url == self.lost:
                raise ConnectionError("connection reset")
            assert self.over.wait(60)
        return {"results": [self.joined] * SIZES[url]} if route == "/collective_rpc" else {}

    joined = ""

    def told(self, route: str) -> dict[str, Any]:
        return {url: body for url, called, body in self.calls if called == route}


class Communicator:
    """In place of NCCL's; a broadcast of it ends an update."""

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        self.sent: list[str] = []
        self.destroyed = threading.Event()

    def destroy(self) -> None:
        self.destroyed.set()
        self.servers.over.set()


@pytest.fixture
def opened(monkeypatch) -> tuple[NCCLChannel, Servers, Communicator]:
    from vllm.distributed.weight_transfer import nccl_engine

    servers = Servers()
    communicator = Communicator(servers)

    def produce(iterator: Iterator[tuple[str, torch.Tensor]], group: Communicator, **_: Any) -> None:
        group.sent += [name for name, _ in iterator]
        if servers.lost is None:
            servers.over.set()
        else:
            assert group.destroyed.wait(60)  # NCCL waits for the lost rank
            raise RuntimeError("the communicator was aborted")

    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda init_info: communicator)
    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", produce)
    channel = NCCLChannel(Fleet(servers, list(SIZES)), SHAPES, torch.bfloat16, 30.0)
    return channel, servers, communicator


def stream() -> Iterator[tuple[str, torch.Tensor]]:
    for name, shape in SHAPES:
        yield name, torch.zeros(shape, dtype=torch.bfloat16)


def test_every_server_is_told_its_place_in_one_group(opened):
    """Rank 0 is the trainer's; then 2, 4 and 1 ranks, server by server."""
    channel, servers, _ = opened
    told = {url: body["init_info"] for url, body in servers.told("/init_weight_transfer_engine").items()}
    assert {url: info["rank_offset"] for url, info in told.items()} == dict(zip(SIZES, (1, 3, 7), strict=True))
    assert {info["world_size"] for info in told.values()} == {8}
    assert {info["packed_buffer_size_bytes"] for info in told.values()} == {NCCL_BUFFER_BYTES}
    for info in told.values():
        meeting = gloo.Meeting(**info["watched"])
        assert not gloo.given_up(gloo.join_store(meeting))
        servers.joined = meeting.name
    assert channel.is_open(5.0)
    servers.joined = "another group"
    assert not channel.is_open(5.0)


def test_a_push_is_one_stream_for_all_servers_between_a_start_and_a_version(opened):
    channel, servers, communicator = opened
    servers.calls.clear()
    channel.send(stream(), 7, lambda: 30.0)
    assert communicator.sent == ["a", "b"]
    routes = ["/start_weight_update", "/update_weights", "/finish_weight_update"]
    assert [[route for url, route, _ in servers.calls if url == server] for server in SIZES] == [routes] * 3
    for body in servers.told("/update_weights").values():
        info = body["update_info"]
        assert (info["names"], info["shapes"], info["dtype_names"]) == (["a", "b"], [[2, 3], [4]], ["bfloat16"] * 2)
    assert set(map(str, servers.told("/finish_weight_update").values())) == {"{'weight_version': '7'}"}


def test_a_push_that_is_given_up_ends_for_servers_and_trainer(opened):
    """The communicator is aborted here, and the store tells the servers to do the same."""
    channel, servers, communicator = opened
    servers.lost = next(iter(SIZES))
    store = gloo.join_store(
        gloo.Meeting(**servers.told("/init_weight_transfer_engine")[servers.lost]["init_info"]["watched"])
    )
    faults: list[Exception] = []

    def send() -> None:
        try:
            channel.send(stream(), 7, lambda: 30.0)
        except Exception as error:
            faults.append(error)

    sending = threading.Thread(target=send)
    sending.start()
    while not any(update.done() for update in channel.updates.values()):
        assert sending.is_alive()
    assert [url for url, update in channel.updates.items() if update.done()] == [servers.lost]
    channel.close()
    sending.join(60)
    assert gloo.given_up(store) and communicator.destroyed.is_set() and len(faults) == 1
