"""How weights reach vLLM servers: gloo without a GPU, vLLM's own NCCL trainer API with one, memory of the node where
servers share the trainer's GPUs, files as the fallback.

A channel brings paused servers from their old weights to a numbered version of new ones: all of them, or it raises and
none counts. Over NCCL and gloo the trainer and every rank of every server are one group, rank 0 and then server by
server, so that each tensor is sent once however many servers there are.
"""

import ipaddress
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from safetensors.torch import save_file
from torch import Tensor

from nemo_jepo.rollout.vllm import gloo
from nemo_jepo.rollout.vllm.fleet import Fleet, ServersFailed, answers_of, failures_of, in_thread, opened
from nemo_jepo.rollout.vllm.shared_memory import SharedSlots
from nemo_jepo.utils.network import free_ports

NamedTensor = tuple[str, Tensor]
Shapes = Sequence[tuple[str, tuple[int, ...]]]
Remaining = Callable[[], float]
"""Seconds that a push still has."""

GRACE_S = 10.0
"""Seconds in which a server must let go of a push that was given up. Its call lasts longer: a late answer is one."""
NCCL_BUFFER_BYTES = 256 << 20
"""Of each of the two buffers that vLLM's trainer and its servers pack tensors into. vLLM's own 1 GiB takes a server
what its key-value cache has left of the GPU."""


class Channel(Protocol):
    """The open connection to some servers."""

    urls: tuple[str, ...]
    updates: dict[str, "Future[Any]"]
    """Each server's call that lasts as long as it receives; empty while none does."""

    def is_open(self, timeout_s: float) -> bool:
        """Whether the servers' processes are those that it was opened with: one that was started again has no part."""

    def send(self, tensors: Iterable[NamedTensor], version: int, remaining_s: Remaining) -> None:
        """Bring the servers, which are paused, to these weights and this version.

        Raises:
            ServersFailed: some could not; whatever else is raised does not say who is to blame.
        """

    def missing(self, url: str, num_sent: int) -> str:
        """Which ranks of a server have not taken what was sent, as far as the backend can tell."""

    def close(self) -> None:
        """Leave the group; servers that wait in it for tensors are let go."""


class _Group:
    """What a gloo and an NCCL group have in common: where they meet, and who has which rank."""

    def __init__(self, fleet: Fleet, timeout_s: float) -> None:
        self.urls = fleet.urls
        self.updates: dict[str, Future[Any]] = {}
        self._fleet = fleet
        sizes = [answer["world_size"] for answer in fleet.call("GET", "/get_world_size", timeout_s=timeout_s).values()]
        self._first_ranks = dict(zip(self.urls, itertools.accumulate(sizes, initial=1), strict=False))
        self._sizes = dict(zip(self.urls, sizes, strict=True))
        self._world_size = 1 + sum(sizes)
        self._address = meeting_address(self.urls)
        self._store = gloo.open_store(self._address, self._world_size, timeout_s)
        self._meeting = gloo.Meeting(self._address, self._store.port, self._world_size, timeout_s)

    def is_open(self, timeout_s: float) -> bool:
        """See `Channel`."""
        return all_joined(self._fleet, self._meeting.name, timeout_s)

    def _ranks_of(self, url: str) -> range:
        return range(self._first_ranks[url], self._first_ranks[url] + self._sizes[url])


class GlooChannel(_Group):
    """A gloo group with every rank of the servers; the receivers are `nemo_jepo.rollout.vllm.plugin.GlooReceiver`.

    Args:
        fleet: the servers.
        shapes: names and shapes of what will be sent, in order.
        dtype: of all of it.
        timeout_s: for a server's answers while it is opened, and for a receiver's wait for the next bucket.
    """

    def __init__(self, fleet: Fleet, shapes: Shapes, dtype: torch.dtype, timeout_s: float) -> None:
        super().__init__(fleet, timeout_s)
        self._described = {
            "names": [name for name, _ in shapes],
            "dtype_name": str(dtype).removeprefix("torch."),
            "shapes": [list(shape) for _, shape in shapes],
        }
        self._shapes, self._dtype = [shape for _, shape in shapes], dtype
        inits = {
            url: {"init_info": asdict(self._meeting) | {"rank_offset": first}}
            for url, first in self._first_ranks.items()
        }
        asked = fleet.begin("POST", "/init_weight_transfer_engine", inits, timeout_s=timeout_s)
        met = in_thread(lambda: gloo.TransferGroup(self._meeting, 0, self._store))
        self._group: gloo.TransferGroup = opened(met, lambda: asked)
        answers_of(asked)

    def send(self, tensors: Iterable[NamedTensor], version: int, remaining_s: Remaining) -> None:
        """See `Channel`."""
        fleet = self._fleet
        gloo.begin_count(self._store, self._world_size)
        begin_update(fleet, remaining_s())
        described = fleet.same({"update_info": self._described})
        self.updates = fleet.begin("POST", "/update_weights", described, timeout_s=remaining_s() + 2 * GRACE_S)
        for bucket in gloo.packed((tensor for _, tensor in tensors), self._shapes, self._dtype):
            if failed := failures_of(self.updates):
                raise RuntimeError("; ".join(failed.values()))
            self._group.send(bucket, remaining_s())
        answers_of(self.updates)
        named = fleet.same({"weight_version": str(version)})
        fleet.call("POST", "/finish_weight_update", named, timeout_s=remaining_s())

    def missing(self, url: str, num_sent: int) -> str:
        """See `Channel`; receivers note in the group's store how far they are."""
        counts = gloo.received(self._store, self._ranks_of(url))
        told = [f"rank {rank} never joined" for rank, count in counts.items() if count is None]
        late = {rank: count for rank, count in counts.items() if count is not None and count < num_sent}
        told += [f"missing rank {rank} (has {count})" for rank, count in late.items()]
        return ", ".join(told) or "every rank has it all, and the server does not answer"

    def close(self) -> None:
        """See `Channel`: the connections end, and with them every wait for a tensor."""
        del self._group


class NCCLChannel(_Group):
    """vLLM's own trainer for its NCCL weight transfer, with this process as rank 0. Arguments as GlooChannel.

    The receivers are `nemo_jepo.rollout.vllm.plugin.WatchedNCCLReceiver`, vLLM's own with one thing more: NCCL has no
    timeout, so they look at the group's store whether the push was given up, and then leave the group.
    """

    def __init__(self, fleet: Fleet, shapes: Shapes, dtype: torch.dtype, timeout_s: float) -> None:
        from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        class Source(WeightSource):
            """The stream of this update; vLLM reads it once."""

            tensors: Iterable[NamedTensor] = ()

            def metadata(self) -> list[Any]:
                return [ParamMeta(name, dtype, shape) for name, shape in shapes]

            def __iter__(self) -> Iterator[NamedTensor]:
                return iter(self.tensors)

        super().__init__(fleet, timeout_s)
        self._client = _SyncClient(self, fleet, asdict(self._meeting), self._first_ranks, lambda: timeout_s)
        self._source = Source()
        meeting = NCCLTrainerInitInfo(
            self._address,
            *free_ports(1, self._address),
            self._world_size,
            packed_buffer_size_bytes=NCCL_BUFFER_BYTES,
            rank=0,
        )
        start = WeightTransferTrainerFactory.trainer_init
        opening = in_thread(lambda: start(meeting, client=self._client, source=self._source))
        self._engine = opened(opening, lambda: self._client.inits)

    def send(self, tensors: Iterable[NamedTensor], version: int, remaining_s: Remaining) -> None:
        """See `Channel`."""
        self._source.tensors, self._client.version, self._client.remaining_s = tensors, version, remaining_s
        self._engine.send_weights()

    def missing(self, url: str, num_sent: int) -> str:
        """See `Channel`."""
        ranks = self._ranks_of(url)
        return f"missing one of the ranks {ranks[0]} to {ranks[-1]} (NCCL does not say which)"

    def close(self) -> None:
        """See `Channel`: a broadcast that waits for a lost rank ends on both sides (ncclCommAbort)."""
        gloo.give_up(self._store)
        self._engine.shutdown()


class _SyncClient:
    """vLLM's VLLMWeightSyncClient over the control routes of several servers; the finished update gets its version."""

    def __init__(
        self,
        channel: NCCLChannel,
        fleet: Fleet,
        watched: Mapping[str, Any],
        first_ranks: Mapping[str, int],
        remaining_s: Remaining,
    ) -> None:
        self._channel, self._fleet, self._watched, self._first_ranks = channel, fleet, watched, first_ranks
        self.version, self.remaining_s = -1, remaining_s
        self.inits: dict[str, Future[Any]] = {}

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Each server with its place in the group, and with the store that it has to look at."""
        bodies = {
            url: {"init_info": init_info | {"rank_offset": first, "watched": dict(self._watched)}}
            for url, first in self._first_ranks.items()
        }
        self.inits = self._fleet.begin("POST", "/init_weight_transfer_engine", bodies, timeout_s=self.remaining_s())
        answers_of(self.inits)

    def start_weight_update(self) -> None:
        begin_update(self._fleet, self.remaining_s())

    def update_weights(self, update_info: dict[str, Any]) -> None:
        bodies, timeout_s = self._fleet.same({"update_info": update_info}), self.remaining_s() + 2 * GRACE_S
        self._channel.updates = self._fleet.begin("POST", "/update_weights", bodies, timeout_s=timeout_s)
        answers_of(self._channel.updates)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        named = self._fleet.same({"weight_version": weight_version or str(self.version)})
        self._fleet.call("POST", "/finish_weight_update", named, timeout_s=self.remaining_s())


class SharedMemoryChannel:
    """Memory that the servers of this node map; the receivers are `nemo_jepo.rollout.vllm.plugin.MemoryReceiver`.

    Servers read a slot while the next one is filled, and none of them hangs on another. Arguments as GlooChannel.
    """

    def __init__(self, fleet: Fleet, shapes: Shapes, dtype: torch.dtype, timeout_s: float) -> None:
        self.urls = fleet.urls
        self.updates: dict[str, Future[Any]] = {}
        self._fleet, self._shapes = fleet, shapes
        self._dtype_name = str(dtype).removeprefix("torch.")
        self._memory = SharedSlots([shape for _, shape in shapes], dtype)
        place = fleet.same({"init_info": asdict(self._memory.place)})
        fleet.call("POST", "/init_weight_transfer_engine", place, timeout_s=timeout_s)

    def is_open(self, timeout_s: float) -> bool:
        """See `Channel`."""
        return all_joined(self._fleet, self._memory.place.path, timeout_s)

    def send(self, tensors: Iterable[NamedTensor], version: int, remaining_s: Remaining) -> None:
        """See `Channel`."""
        fleet, stream = self._fleet, (tensor for _, tensor in tensors)
        begin_update(fleet, remaining_s())
        done = 0
        for number, bucket in enumerate(self._memory.buckets):
            start = self._memory.fill(number, stream)
            answers_of(self.updates)  # of the bucket before: the other slot is free for the one behind
            part = self._shapes[done : done + len(bucket)]
            described = {
                "names": [name for name, _ in part],
                "dtype_name": self._dtype_name,
                "shapes": [list(shape) for _, shape in part],
                "start": start,
            }
            bodies = fleet.same({"update_info": described})
            self.updates = fleet.begin("POST", "/update_weights", bodies, timeout_s=remaining_s() + 2 * GRACE_S)
            done += len(bucket)
        answers_of(self.updates)
        named = fleet.same({"weight_version": str(version)})
        fleet.call("POST", "/finish_weight_update", named, timeout_s=remaining_s())

    def missing(self, url: str, num_sent: int) -> str:
        """See `Channel`."""
        return "it is still reading the shared memory"

    def close(self) -> None:
        """See `Channel`; nobody waits for the trainer but between its calls."""
        self._memory.close()


class FileChannel:
    """Has servers read a folder that they share with the trainer. Files are written by `write_files`."""

    def __init__(self, fleet: Fleet, folder: Path) -> None:
        self.urls = fleet.urls
        self.updates: dict[str, Future[Any]] = {}
        self._fleet, self._folder = fleet, folder

    def is_open(self, timeout_s: float) -> bool:
        """See `Channel`; nothing is kept open."""
        return True

    def send(self, tensors: Iterable[NamedTensor], version: int, remaining_s: Remaining) -> None:
        """See `Channel`; the tensors are in the files already."""
        load = self._fleet.same({"method": "load_files", "kwargs": {"folder": str(self._folder)}})
        self.updates = self._fleet.begin("POST", "/collective_rpc", load, timeout_s=remaining_s())
        answers_of(self.updates)
        named = self._fleet.same({"new_version": str(version)})
        self._fleet.call("POST", "/update_weight_version", named, timeout_s=remaining_s())

    def missing(self, url: str, num_sent: int) -> str:
        """See `Channel`."""
        return f"it is still reading {self._folder}"

    def close(self) -> None:
        """See `Channel`; there is no group."""


NO_UPDATE: Mapping[str, Mapping[str, str]] = {"update_info": {}}
"""An update that every backend refuses: vLLM has no other way to end one that was begun."""


def begin_update(fleet: Fleet, timeout_s: float) -> None:
    """Begin an update at every server; one that an earlier trainer began and did not end is ended first."""
    try:
        fleet.call("POST", "/start_weight_update", timeout_s=timeout_s)
    except ServersFailed as failed:
        again = fleet.only(failed.reasons)
        wait(again.begin("POST", "/update_weights", again.same(NO_UPDATE), timeout_s=timeout_s).values())
        again.call("POST", "/start_weight_update", timeout_s=timeout_s)


def all_joined(fleet: Fleet, name: str, timeout_s: float) -> bool:
    """Whether every rank of every server says that it is in the group, or has the memory, of this name."""
    asked = fleet.same({"method": "joined_group"})
    answers = fleet.call("POST", "/collective_rpc", asked, timeout_s=timeout_s)
    return all(set(answer["results"]) == {name} for answer in answers.values())


def meeting_address(urls: Sequence[str]) -> str:
    """The address of this host that all servers reach: loopback only where every server is on this host."""
    hosts = [urlsplit(url).hostname or "" for url in urls]
    addresses = [gloo.own_address(host) for host in hosts]
    outside = [address for address in addresses if not ipaddress.ip_address(address).is_loopback]
    return (outside or addresses)[0]


def write_files(tensors: Iterable[NamedTensor], folder: Path, shard_bytes: int = 1 << 30) -> None:
    """A stream as safetensors shards; the folder has its name only when it is whole, and replaces an older one."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        save_file(shard, partial / f"model-{len(list(partial.iterdir())) + 1:05d}.safetensors", {"format": "pt"})
        shard.clear()

    for name, tensor in tensors:
        shard[name] = tensor.detach().cpu().clone()
        if sum(held.nbytes for held in shard.values()) >= shard_bytes:
            flush()
    if shard:
        flush()
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)
