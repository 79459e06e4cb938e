"""The wire of a weight push without a GPU: a gloo group of one trainer rank and one server's ranks.

Rank 0 sends. The receivers note in the group's store how far they are, so that whoever is missing can be named. Both
ends use this module; it does not import vLLM, which would cost a trainer 8 s and 400 MB.
"""

import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where a group meets."""

    address: str
    """Of the trainer, as the server's ranks reach it."""
    port: int
    world_size: int
    """The trainer and every rank of the server."""
    timeout_s: float
    """Of the meeting, and of every broadcast after it."""


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
        RuntimeError: not everybody came within meeting.timeout_s.
    """

    def __init__(self, meeting: Meeting, rank: int, store: dist.TCPStore) -> None:
        self._rank = rank
        self._store = store
        store.set(f"received/{rank}", "0")
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=own_address(meeting.address))]
        options._timeout = timedelta(seconds=meeting.timeout_s)
        self._group = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, meeting.world_size, options)

    def broadcast(self, tensor: Tensor) -> None:
        """Rank 0's tensor into every rank's; it must be contiguous and on the host."""
        options = torch._C._distributed_c10d.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._group.broadcast([tensor], options).wait()  # type: ignore[attr-defined]

    def note_received(self, count: int) -> None:
        """This receiver has so many tensors of the update that is under way."""
        self._store.set(f"received/{self._rank}", str(count))


def received(store: dist.TCPStore, world_size: int) -> dict[int, int | None]:
    """How many tensors each receiving rank has noted; None for one that never came."""
    counts: dict[int, int | None] = {}
    for rank in range(1, world_size):
        key = f"received/{rank}"
        counts[rank] = int(store.get(key)) if store.check([key]) else None
    return counts
