"""A weight push to several servers of one group: what becomes of the others when one is lost."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_jepo.config.schema import VLLMConfig
from nemo_jepo.rollout.vllm import push
from nemo_jepo.rollout.vllm.channels import Channel, NamedTensor, Remaining, begin_update, meeting_address
from nemo_jepo.rollout.vllm.fleet import Fleet
from nemo_jepo.rollout.vllm.push import Pushed, WeightTransfer

SHAPES = [(f"layer.{number}", (2,)) for number in range(12)]
TIMEOUT_S = 1.0
BEGUN = ["/pause", "/update_weight_version"]
DONE = ["/reset_prefix_cache", "/resume"]
NEVER_S = 1e6
"""A deadline that no test lives to see."""


class Servers:
    """Their control routes; `refuses` has (server, route) pairs that fail."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.refuses: set[tuple[str, str]] = set()

    def __call__(self, url: str, method: str, route: str, *_: Any, **__: Any) -> dict[str, Any]:
        self.calls.append((url, route))
        if (url, route) in self.refuses:
            raise RuntimeError(f"{url}{route} refused")
        return {"success": True}

    def told(self, url: str) -> list[str]:
        """Routes that changed something at a server, since the last time."""
        told = [route for server, route in self.calls if server == url and route != "/health"]
        self.calls = [call for call in self.calls if call[0] != url]
        return told


class Group:
    """Servers that receive together: one that fails stops the others, until the trainer lets go of them."""

    def __init__(self, urls: Sequence[str]) -> None:
        self.urls = tuple(urls)
        self.updates: dict[str, Future[Any]] = {}
        self.taken: list[str] = []
        self.closed = threading.Event()
        self.stands_still: set[str] = set()
        self.dies: set[str] = set()
        self.has_strangers = False

    def is_open(self, timeout_s: float) -> bool:
        return not self.has_strangers

    def send(self, tensors: Iterable[NamedTensor], version: int, remaining_s: Remaining) -> None:
        self.updates = {url: Future() for url in self.urls}
        for name, _ in tensors:
            if len(self.taken) == 3 and (self.stands_still or self.dies):
                for url in self.dies:
                    self.updates[url].set_exception(ConnectionError("connection reset"))
                self.closed.wait()
                raise RuntimeError("the group is gone")
            self.taken.append(name)
        for update in self.updates.values():
            update.set_result({})

    def missing(self, url: str, num_sent: int) -> str:
        return f"missing rank 1 of {url}"

    def close(self) -> None:
        """Every server fails that waited, but not the one that stands still."""
        for url in set(self.updates) - self.stands_still - self.dies:
            if not self.updates[url].done():
                self.updates[url].set_exception(RuntimeError("connection closed by peer"))
        self.closed.set()


class Transfer(WeightTransfer):
    """With groups of ours; the first one has a server that stands still or dies."""

    def __init__(self, servers: Servers, timeout_s: float, folder: Path) -> None:
        settings = VLLMConfig(sync_timeout_s=timeout_s, weight_transfer="gloo")
        super().__init__(servers, settings, SHAPES, torch.float32, folder)
        self.groups: list[Group] = []
        self.stands_still: set[str] = set()
        self.dies: set[str] = set()

    def _open(self, fleet: Fleet) -> Channel:
        group = Group(fleet.urls)
        if not self.groups:
            group.stands_still, group.dies = self.stands_still, self.dies
        self.groups.append(group)
        return group


def weights() -> Iterator[NamedTensor]:
    for name, shape in SHAPES:
        yield name, torch.zeros(shape)


@pytest.fixture
def servers(monkeypatch) -> Servers:
    monkeypatch.setattr(push, "GRACE_S", 0.3)
    return Servers()


def test_all_servers_take_one_stream_and_keep_their_group_for_the_next(servers, tmp_path):
    transfer = Transfer(servers, NEVER_S, tmp_path)
    for version in (1, 2):
        assert transfer.push("abc", weights(), version) == Pushed(updated=("a", "b", "c"))
        for url in "abc":
            assert servers.told(url) == BEGUN + DONE
    (group,) = transfer.groups
    assert group.taken == [name for name, _ in SHAPES] * 2


def test_a_server_that_stands_still_is_lost_at_the_deadline_and_the_others_wait_for_the_stream_once_more(
    servers, tmp_path
):
    transfer = Transfer(servers, TIMEOUT_S, tmp_path)
    transfer.stands_still = {"b"}
    pushed = transfer.push("abc", weights(), version=1)
    assert pushed.waiting == ("a", "c") and pushed.updated == ()
    assert pushed.lost == {
        "b": "no weight sync within rollout.vllm.sync_timeout_s. Sent 4 of 12 tensors, the last layer.3; "
        "missing rank 1 of b"
    }
    assert pushed.stuck == {"b"}
    # Nobody samples with weights of which half has come
    assert servers.told("a") == servers.told("b") == servers.told("c") == BEGUN
    assert transfer.push(pushed.waiting, weights(), version=1) == Pushed(updated=("a", "c"))
    assert [group.urls for group in transfer.groups] == [("a", "b", "c"), ("a", "c")]
    assert servers.told("a") == BEGUN + DONE


def test_a_server_that_dies_ends_the_push_at_once(servers, tmp_path):
    transfer = Transfer(servers, NEVER_S, tmp_path)
    transfer.dies = {"b"}
    servers.refuses = {("b", "/health")}
    pushed = transfer.push("abc", weights(), version=1)
    assert pushed.waiting == ("a", "c") and "ConnectionError: connection reset. Sent 4 of 12" in pushed.lost["b"]


def test_servers_are_all_lost_where_nobody_can_tell_whose_fault_it_was(servers, tmp_path):
    transfer = Transfer(servers, TIMEOUT_S, tmp_path)
    transfer.stands_still = {"nobody"}
    pushed = transfer.push("ab", weights(), version=1)
    assert set(pushed.lost) == {"a", "b"} and not pushed.waiting


@pytest.mark.parametrize("route", ["/pause", "/reset_prefix_cache", "/resume"])
def test_a_server_that_refuses_a_route_is_lost_alone(servers, tmp_path, route):
    transfer = Transfer(servers, NEVER_S, tmp_path)
    servers.refuses = {("a", route)}
    pushed = transfer.push("ab", weights(), version=1)
    assert pushed.waiting == ("b",) and f"a{route} refused" in pushed.lost["a"]


def test_the_whole_stream_is_read_where_no_server_is_left(servers, tmp_path):
    stream = weights()
    assert Transfer(servers, NEVER_S, tmp_path).push("", stream, version=1) == Pushed()
    assert next(stream, None) is None


def test_a_replica_without_servers_writes_no_files(servers, tmp_path):
    settings, stream = VLLMConfig(weight_transfer="file"), weights()
    transfer = WeightTransfer(servers, settings, SHAPES, torch.float32, tmp_path / "weights")
    assert transfer.push("", stream, version=1) == Pushed()
    assert next(stream, None) is None and not list(tmp_path.iterdir())


def test_a_server_that_was_started_again_is_taken_into_a_new_group(servers, tmp_path):
    """It has the same address and has never heard of the old one."""
    transfer = Transfer(servers, NEVER_S, tmp_path)
    transfer.push("ab", weights(), version=1)
    transfer.groups[0].has_strangers = True
    assert transfer.push("ab", weights(), version=2) == Pushed(updated=("a", "b"))
    assert len(transfer.groups) == 2 and transfer.groups[0].closed.is_set()


def test_a_stream_that_breaks_off_lets_go_of_the_servers_before_it_is_raised(servers, tmp_path):
    transfer = Transfer(servers, NEVER_S, tmp_path)

    def broken() -> Iterator[NamedTensor]:
        yield from list(weights())[:5]
        raise RuntimeError("a rank is gone")

    with pytest.raises(RuntimeError, match="a rank is gone"):
        transfer.push("ab", broken(), version=1)
    assert transfer.groups[0].closed.is_set()
    assert transfer.push("ab", weights(), version=1) == Pushed(updated=("a", "b"))


def test_an_update_that_an_earlier_trainer_left_open_is_ended_before_a_new_one_begins():
    calls: list[tuple[str, str]] = []
    open_at = {"b"}

    def control(url: str, method: str, route: str, body: Any = None, **_: Any) -> dict[str, Any]:
        calls.append((url, route))
        if route == "/start_weight_update" and url in open_at:
            raise RuntimeError("a weight update is already active")
        if route == "/update_weights":
            open_at.discard(url)
            raise RuntimeError("what comes is not an update")
        return {}

    begin_update(Fleet(control, "ab"), 5.0)
    start = "/start_weight_update"
    assert [route for url, route in calls if url == "a"] == [start]
    assert [route for url, route in calls if url == "b"] == [start, "/update_weights", start]


def test_a_group_meets_on_loopback_only_where_all_servers_are_on_this_host(monkeypatch):
    monkeypatch.setattr(
        "nemo_jepo.rollout.vllm.gloo.own_address", lambda host: "127.0.0.1" if host == "127.0.0.1" else "10.0.0.2"
    )
    assert meeting_address(["http://127.0.0.1:1", "http://127.0.0.1:2"]) == "127.0.0.1"
    assert meeting_address(["http://127.0.0.1:1", "http://10.0.0.9:2"]) == "10.0.0.2"
