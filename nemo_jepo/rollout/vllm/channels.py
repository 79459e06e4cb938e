"""How weights reach one vLLM server: gloo without a GPU, vLLM's own NCCL trainer API with one, files as the fallback.

Every channel brings a paused server from its old weights to a numbered version of new ones, or raises.
"""

import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from safetensors.torch import save_file
from torch import Tensor

from nemo_jepo.rollout.vllm import gloo
from nemo_jepo.utils.network import free_ports

NamedTensor = tuple[str, Tensor]
Shapes = Sequence[tuple[str, tuple[int, ...]]]
Control = Callable[..., dict[str, Any]]
"""`nemo_jepo.rollout.vllm.pool.Pool.control`: calls a control route of a server."""


class Channel(Protocol):
    """The open connection to one server."""

    def send(self, tensors: Iterable[NamedTensor], version: int) -> None:
        """Bring the server, which is paused, to these weights and this version."""

    def missing(self, num_sent: int) -> str:
        """Which of the server's ranks have not taken what was sent, as far as the backend can tell."""


class GlooChannel:
    """A gloo group with every rank of one server; the receivers are `nemo_jepo.rollout.vllm.plugin.GlooReceiver`.

    Args:
        control: calls the server's routes.
        url: of the server.
        shapes: names and shapes of what will be sent, in order.
        dtype: of all of it.
        timeout_s: for the meeting, and for every broadcast.
    """

    def __init__(self, control: Control, url: str, shapes: Shapes, dtype: torch.dtype, timeout_s: float) -> None:
        self._control, self._url, self._timeout_s = control, url, timeout_s
        self._described = {
            "names": [name for name, _ in shapes],
            "dtype_name": str(dtype).removeprefix("torch."),
            "shapes": [list(shape) for _, shape in shapes],
        }
        self._shapes, self._dtype = [shape for _, shape in shapes], dtype
        self._world_size = 1 + control(url, "GET", "/get_world_size")["world_size"]
        address = gloo.own_address(urlsplit(url).hostname or "")
        self._store = gloo.open_store(address, self._world_size, timeout_s)
        meeting = gloo.Meeting(address, self._store.port, self._world_size, timeout_s)
        asked = in_thread(lambda: self._post("/init_weight_transfer_engine", {"init_info": asdict(meeting)}))
        met = in_thread(lambda: gloo.TransferGroup(meeting, 0, self._store))
        self._group = first_fault(asked, met)[1]

    def _post(self, route: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return self._control(self._url, "POST", route, body, timeout_s=self._timeout_s)

    def send(self, tensors: Iterable[NamedTensor], version: int) -> None:
        """See `Channel`."""
        gloo.begin_count(self._store, self._world_size)
        self._post("/start_weight_update")
        taken = in_thread(lambda: self._post("/update_weights", {"update_info": self._described}))
        for bucket in gloo.packed((tensor for _, tensor in tensors), self._shapes, self._dtype):
            if taken.done():
                taken.result()
                raise RuntimeError("the server ended the update early")
            self._group.broadcast(bucket)
        taken.result()
        self._post("/finish_weight_update", {"weight_version": str(version)})

    def missing(self, num_sent: int) -> str:
        """See `Channel`."""
        if num_sent == 0:
            return f"the server did not begin to receive (ranks 1 to {self._world_size - 1})"
        counts = gloo.received(self._store, self._world_size)
        absent = [rank for rank, count in counts.items() if count is None]
        late = [f"{rank} (has {count})" for rank, count in counts.items() if count is not None and count < num_sent]
        told = [f"rank {rank} never joined" for rank in absent] + [f"missing rank {rank}" for rank in late]
        return ", ".join(told) or "every rank has it all, and the server does not answer"


class NCCLChannel:
    """vLLM's own trainer for its NCCL weight transfer, with this process as rank 0. Arguments as GlooChannel."""

    def __init__(self, control: Control, url: str, shapes: Shapes, dtype: torch.dtype, timeout_s: float) -> None:
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

        self._client = _SyncClient(control, url, timeout_s)
        self._source = Source()
        self._num_ranks = control(url, "GET", "/get_world_size")["world_size"]
        address = gloo.own_address(urlsplit(url).hostname or "")
        meeting = NCCLTrainerInitInfo(address, *free_ports(1, address), 1 + self._num_ranks, rank=0)
        self._engine = WeightTransferTrainerFactory.trainer_init(meeting, client=self._client, source=self._source)

    def send(self, tensors: Iterable[NamedTensor], version: int) -> None:
        """See `Channel`."""
        self._source.tensors, self._client.version = tensors, version
        self._engine.send_weights()

    def missing(self, num_sent: int) -> str:
        """See `Channel`."""
        return f"missing one of the ranks 1 to {self._num_ranks} (NCCL does not say which)"


class _SyncClient:
    """vLLM's VLLMWeightSyncClient over our control routes; the finished update gets its version."""

    def __init__(self, control: Control, url: str, timeout_s: float) -> None:
        self._control, self._url, self._timeout_s = control, url, timeout_s
        self.version = -1

    def _post(self, route: str, body: Mapping[str, Any] | None = None) -> None:
        self._control(self._url, "POST", route, body, timeout_s=self._timeout_s)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._post("/start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post("/finish_weight_update", {"weight_version": weight_version or str(self.version)})


class FileChannel:
    """Has the server read a folder that it shares with the trainer. Files are written by `write_files`."""

    def __init__(self, control: Control, url: str, folder: Path, timeout_s: float) -> None:
        self._control, self._url, self._folder, self._timeout_s = control, url, folder, timeout_s

    def send(self, tensors: Iterable[NamedTensor], version: int) -> None:
        """See `Channel`; the tensors are in the files already."""
        for route, body in (
            ("/collective_rpc", {"method": "load_files", "kwargs": {"folder": str(self._folder)}}),
            ("/update_weight_version", {"new_version": str(version)}),
        ):
            self._control(self._url, "POST", route, body, timeout_s=self._timeout_s)

    def missing(self, num_sent: int) -> str:
        """See `Channel`."""
        return f"it is still reading {self._folder}"


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


def in_thread(work: Callable[[], Any]) -> "Future[Any]":
    """The result of a call in a thread that does not keep the program alive: a lost peer may hold it for long."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def first_fault(*futures: "Future[Any]") -> list[Any]:
    """Every result, or the first exception as soon as there is one."""
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for future in done:
        future.result()
    return [future.result() for future in futures]
