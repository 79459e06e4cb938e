"""The wire of a weight push without a GPU: a gloo group of one trainer rank and the servers' ranks.

Rank 0 sends. Tensors travel in buckets, from rank 0 to every other one itself: in gloo's broadcast receivers pass them
on, and one that stands still would hold others where nobody can reach them. Both ends cut the stream into the same
buckets. The receivers note in the group's store how far they are, so that whoever is missing can be named. Both ends
use this module; it does not import vLLM, which would cost a trainer 8 s and 400 MB.
"""

import math
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MEETING_TIMEOUT_S = 60.0
"""Seconds in which every rank must have come to a meeting: they are asked at the same time."""
BUCKET_BYTES = 16 << 20
"""Most of a bucket, unless one tensor is larger. Below 32 MiB glibc gives freed memory out again, already touched; a
larger buffer's pages are new each time, which costs the receiver more than fewer messages save it."""

Shape = Sequence[int]


def buckets(shapes: Sequence[Shape], itemsize: int, limit: int | None = None) -> Iterator[list[int]]:
    """Elements of each tensor, bucket by bucket: as many neighbours as fit, or one tensor that is larger.

    Args:
        limit: bytes of a bucket; None for BUCKET_BYTES.
    """
    limit = limit or BUCKET_BYTES
    bucket: list[int] = []
    for shape in shapes:
        count = math.prod(shape)
        if bucket and (sum(bucket) + count) * itemsize > limit:
            yield bucket
            bucket = []
        bucket.append(count)
    if bucket:
        yield bucket


def packed(tensors: Iterator[Tensor], shapes: Sequence[Shape], dtype: torch.dtype) -> Iterator[Tensor]:
    """What to send: each bucket's tensors side by side on the host, in one buffer for all; a lone one as it is."""
    buffer = torch.empty(BUCKET_BYTES // dtype.itemsize, dtype=dtype)
    for bucket in buckets(shapes, dtype.itemsize):
        if len(bucket) == 1:
            yield next(tensors).cpu().contiguous()
            continue
        flat = buffer[: sum(bucket)]
        for part in flat.split(bucket):
            tensor = next(tensors)
            part.view(tensor.shape).copy_(tensor)
        yield flat


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where a group meets."""

    address: str
    """Of the trainer, as the server's ranks reach it."""
    port: int
    world_size: int
    """The trainer and every rank of the servers."""
    timeout_s: float
    """Of a receiver's wait for a bucket."""

    @property
    def name(self) -> str:
        """Tells one group from another."""
        return f"{self.address}:{self.port}"


def own_address(towards: str) -> str:
    """This host's address on the way to another host: the only one that is opened."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, 9))  # sends nothing
        return probe.getsockname()[0]


def open_store(address: str, world_size: int, timeout_s: float) -> dist.TCPStore:
    """The store of a new group, on a free port of one address of this host; `store.port` says which."""
    listener = socket.create_server((address, 0))
    return dist.TCPStore(
        address,
        listener.getsockname()[1],
        world_size,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def join_store(meeting: Meeting) -> dist.TCPStore:
    """The trainer's store, from a receiver."""
    timeout = timedelta(seconds=meeting.timeout_s)
    return dist.TCPStore(
        meeting.address, meeting.port, meeting.world_size, False, timeout=timeout, wait_for_workers=False
    )


class TransferGroup:
    """One rank of a group that weights travel through.

    Args:
        meeting: where.
        rank: 0 for the trainer.
        store: from `open_store` or `join_store`.
    Raises:
        RuntimeError: not everybody came within MEETING_TIMEOUT_S.
    """

    def __init__(self, meeting: Meeting, rank: int, store: dist.TCPStore) -> None:
        self._rank, self._patience = rank, timedelta(seconds=meeting.timeout_s)
        self._store = store
        store.set(f"received/{rank}", "0")
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=own_address(meeting.address))]
        options._timeout = timedelta(seconds=MEETING_TIMEOUT_S)
        self._group: Any = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, meeting.world_size, options)

    def send(self, tensor: Tensor, timeout_s: float) -> None:
        """Rank 0's tensor to every other rank; it must be contiguous and on the host.

        Raises:
            RuntimeError: a rank is gone, or has not taken it in time; the connections to all of them have ended then.
        """
        for sent in [self._group.send([tensor], rank, 0) for rank in range(1, self._group.size())]:
            sent.wait(timedelta(seconds=timeout_s))

    def receive(self, shapes: Sequence[Shape], dtype: torch.dtype) -> Iterator[list[Tensor]]:
        """Each bucket's tensors as they come, views of a buffer of its own; asking for the next notes these as here."""
        done = 0
        for bucket in buckets(shapes, dtype.itemsize):
            flat = torch.empty(sum(bucket), dtype=dtype)
            self._group.recv([flat], 0, 0).wait(self._patience)
            parts = flat.split(bucket)
            yield [part.view(*shape) for part, shape in zip(parts, shapes[done : done + len(bucket)], strict=True)]
            done += len(bucket)
            self._note_received(done)

    def _note_received(self, count: int) -> None:
        """This receiver has so many tensors of the update that is under way."""
        self._store.set(f"received/{self._rank}", str(count))


def begin_count(store: dist.TCPStore, world_size: int) -> None:
    """No receiving rank has a tensor of the update that is about to begin."""
    for rank in range(1, world_size):
        store.set(f"received/{rank}", "0")


def received(store: dist.TCPStore, ranks: Iterable[int]) -> dict[int, int | None]:
    """How many tensors each of these ranks has noted; None for one that never came."""
    keys = {rank: f"received/{rank}" for rank in ranks}
    return {rank: int(store.get(key)) if store.check([key]) else None for rank, key in keys.items()}


def give_up(store: dist.TCPStore) -> None:
    """Tell receivers that nothing more will come over this group."""
    store.set("given_up", "yes")


def given_up(store: dist.TCPStore) -> bool:
    """Whether the trainer said so, or is gone with its store."""
    try:
        return store.check(["given_up"])
    except dist.DistError:
        return True
