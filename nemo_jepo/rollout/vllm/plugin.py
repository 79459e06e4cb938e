"""What runs inside vLLM's processes: the receiving end of a weight push, and their end with their parent.

vLLM calls `register` in each of its processes (entry point nemo_jepo of vllm.general_plugins, chosen by VLLM_PLUGINS).
Over NCCL vLLM receives weights by itself; here it learns to leave a push that was given up. "gloo" is for servers
without a GPU.
"""

import itertools
import os
import re
import threading
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferUpdateInfo

from nemo_jepo.rollout.vllm.gloo import Meeting, TransferGroup, given_up, join_store
from nemo_jepo.rollout.vllm.reload import begin_reload, check_description, end_reload, tensors_in
from nemo_jepo.rollout.vllm.shared_memory import Place, mapped, tensors_at, unpin
from nemo_jepo.utils.processes import die_with_parent

STOPS_WITH_PARENT = "NEMO_JEPO_VLLM_STOPS_WITH_PARENT"
"""Set in the environment of servers that `nemo-jepo serve` starts."""
WATCH_INTERVAL_S = 0.5
"""Between two looks at the trainer's store, while weights are received."""


def register() -> None:
    """vLLM's entry point; may be called more than once in a process."""
    if STOPS_WITH_PARENT in os.environ:
        die_with_parent()
    for name, receiver in RECEIVERS.items():
        if name not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(name, receiver)


@dataclass(kw_only=True)
class GlooInit(WeightTransferInitInfo):
    """Fields of `nemo_jepo.rollout.vllm.gloo.Meeting`, as they come over HTTP."""

    address: str
    port: int
    world_size: int
    timeout_s: float
    rank_offset: int
    """Of the server's first rank in the group."""


@dataclass
class GlooUpdate(WeightTransferUpdateInfo):
    """What the trainer sends, in order."""

    names: list[str]
    dtype_name: str
    """Of all of them."""
    shapes: list[list[int]]


class GlooReceiver(WeightTransferEngine[GlooInit, GlooUpdate]):
    """vLLM's receiving engine of the backend "gloo": checkpoint format, whole tensors in buckets, a broadcast each."""

    init_info_cls = GlooInit
    update_info_cls = GlooUpdate
    _group: TransferGroup | None = None
    joined = ""
    """Name of the group; as of the other receivers of this module."""

    def init_transfer_engine(self, init_info: GlooInit) -> None:
        """Join the trainer's group; the one from before, of a trainer that is gone, is dropped."""
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        meeting = Meeting(init_info.address, init_info.port, init_info.world_size, init_info.timeout_s)
        self._group, self.joined = None, ""
        self._group = TransferGroup(meeting, rank, join_store(meeting))
        self.joined = meeting.name

    def start_weight_update(self) -> None:
        """See vLLM's NCCLWeightTransferEngine, whose lifecycle this is."""
        begin_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive; vLLM's own method then waits for an accelerator, which is not here."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: GlooUpdate) -> None:
        """One bucket after the other from the trainer into the model."""
        if self._group is None:
            raise RuntimeError("weights are sent before a group was opened")
        dtype = check_description(update_info.names, update_info.shapes, update_info.dtype_name)
        names = iter(update_info.names)
        try:
            for tensors in self._group.receive(update_info.shapes, dtype):
                self.model.load_weights([(next(names), tensor) for tensor in tensors])
        except Exception:
            self.shutdown()  # others learn of it by their connections
            raise

    def finish_weight_update(self) -> None:
        """Make the received weights those of the model."""
        end_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Leave the group."""
        self._group, self.joined = None, ""


@dataclass(kw_only=True)
class MemoryInit(WeightTransferInitInfo):
    """Fields of `nemo_jepo.rollout.vllm.shared_memory.Place`, as they come over HTTP."""

    path: str
    num_bytes: int


@dataclass
class MemoryUpdate(GlooUpdate):
    """One bucket."""

    start: int
    """Of the bucket in the memory, bytes."""


class MemoryReceiver(WeightTransferEngine[MemoryInit, MemoryUpdate]):
    """vLLM's receiving engine of the backend "shared_memory": as GlooReceiver, with a call for each bucket."""

    init_info_cls = MemoryInit
    update_info_cls = MemoryUpdate
    _memory: torch.Tensor | None = None
    joined = ""

    def init_transfer_engine(self, init_info: MemoryInit) -> None:
        """Map the trainer's memory; that of a trainer that is gone is dropped."""
        self.shutdown()
        if not re.fullmatch(r"/proc/\d+/fd/\d+", init_info.path):
            raise ValueError(f"{init_info.path!r} is not the memory of a trainer")
        self._memory, self.joined = mapped(Place(init_info.path, init_info.num_bytes)), init_info.path

    def start_weight_update(self) -> None:
        """See GlooReceiver."""
        begin_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Read a bucket; it has been read when this returns."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def receive_weights(self, update_info: MemoryUpdate) -> None:
        """The bucket's tensors into the model; copies of them, because vLLM keeps those of an unfinished layer."""
        if self._memory is None:
            raise RuntimeError("weights are sent before the memory was shared")
        dtype = check_description(update_info.names, update_info.shapes, update_info.dtype_name)
        views = tensors_at(self._memory, update_info.start, update_info.shapes, dtype)
        copies = [view.to(self.device, copy=True, non_blocking=True) for view in views]
        self.model.load_weights(list(zip(update_info.names, copies, strict=True)))

    def finish_weight_update(self) -> None:
        """See GlooReceiver."""
        end_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Drop the memory."""
        if self._memory is not None:
            unpin(self._memory)
            self._memory, self.joined = None, ""


@dataclass(kw_only=True)
class WatchedNCCLInit(NCCLWeightTransferInitInfo):
    """vLLM's own, and the store to look at: fields of `nemo_jepo.rollout.vllm.gloo.Meeting`."""

    watched: dict[str, Any]


class WatchedNCCLReceiver(NCCLWeightTransferEngine):
    """vLLM's receiving engine for NCCL, which leaves a push that the trainer gave up or did not survive.

    NCCL waits for a lost rank for ever, and so would every server of its group.
    """

    init_info_cls = WatchedNCCLInit
    update_info_cls = NCCLWeightTransferUpdateInfo
    joined = ""

    def init_transfer_engine(self, init_info: WatchedNCCLInit) -> None:
        """Join the trainer's group; the one from before is left."""
        self.shutdown()
        meeting = Meeting(**init_info.watched)
        self._store = join_store(meeting)
        super().init_transfer_engine(init_info)
        self.joined = meeting.name

    def start_weight_update(self) -> None:
        """See GlooReceiver."""
        begin_reload(self.model)

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """As vLLM does it.

        Raises:
            RuntimeError: the push was given up; what has come of it is not to be used.
        """
        over, left = threading.Event(), threading.Event()

        def watch() -> None:
            while not over.wait(WATCH_INTERVAL_S):
                if given_up(self._store):
                    left.set()
                    self.shutdown()  # ncclCommAbort: broadcasts that wait return, later ones do nothing
                    return

        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        try:
            super().receive_weights(update_info)
        finally:
            over.set()
            watching.join()
        if left.is_set():
            raise RuntimeError("the trainer gave this weight push up")

    def finish_weight_update(self) -> None:
        """See GlooReceiver."""
        end_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Leave the group."""
        self.joined = ""
        super().shutdown()


RECEIVERS: dict[str, type[WeightTransferEngine[Any, Any]]] = {
    "gloo": GlooReceiver,
    "shared_memory": MemoryReceiver,
    "watched_nccl": WatchedNCCLReceiver,
}
"""Backends of vLLM's --weight-transfer-config that this module adds."""


class WorkerExtension:
    """Methods that `/collective_rpc` reaches in every worker (--worker-extension-cls)."""

    def joined_group(self) -> str:
        """Name of the group or memory that weights come through; empty where none was joined."""
        return self.weight_transfer_engine.joined  # type: ignore[attr-defined]

    def load_files(self, folder: str) -> None:
        """Take the weights from a folder of safetensors; ValueError where they are not the model's, or not all of them.

        vLLM's own reload_weights refuses a server that started with random weights (--load-format dummy).
        """
        model, tensors = self.get_model(), tensors_in(folder)  # type: ignore[attr-defined]
        first = next(tensors)
        begin_reload(model)
        for named_tensor in itertools.chain([first], tensors):
            model.load_weights([named_tensor])
        end_reload(model, self.vllm_config.model_config)  # type: ignore[attr-defined]
