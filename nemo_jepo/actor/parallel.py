"""Process groups of one run: who shares a layer, a pipeline, a replica; and the few collectives the loop needs.

A replica is one copy of the model: the tensor-, pipeline- and context-parallel ranks together. Data-parallel ranks
hold different prompts, and with expert parallelism each other's experts. Every collective outside Megatron's own
lives here or in weights/.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_jepo.actor import cpu, fallback
from nemo_jepo.config.errors import ConfigError, SettingsError
from nemo_jepo.config.schema import ModelConfig
from nemo_jepo.utils import phases

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
FIRST_RANK_TIMEOUT = timedelta(days=1)
"""A download may take hours."""
Result = TypeVar("Result")
_replica_group: dist.ProcessGroup | None = None


def init_distributed(timeout: timedelta = COLLECTIVE_TIMEOUT) -> None:
    """Join the process group that torchrun, srun or nobody (one process) describes: NCCL on GPUs, gloo on CPU.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT (torchrun's names); with none of them set the
    group has one member and no port is opened.
    """
    if dist.is_initialized():
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cuda:nccl,cpu:gloo"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        cpu.install()
    fallback.install()
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def init_model_parallel(model: ModelConfig) -> None:
    """Split the world into tensor-, pipeline- and data-parallel groups; replaces an earlier split.

    The world size must be a multiple of the product of the sizes: ModelConfig.data_parallel_size checks it.
    """
    from megatron.core import parallel_state, tensor_parallel

    global _replica_group
    if parallel_state.is_initialized():
        _destroy_groups()
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        model.tensor_model_parallel_size,
        model.pipeline_model_parallel_size,
        model.virtual_pipeline_model_parallel_size,
        context_parallel_size=model.context_parallel_size,
        expert_model_parallel_size=model.expert_model_parallel_size,
        expert_tensor_parallel_size=1,
    )
    _replica_group = _new_replica_group(parallel_state.get_data_parallel_group())
    tensor_parallel.random.initialize_rng_tracker(force_reset=True)
    tensor_parallel.model_parallel_cuda_manual_seed(model.seed)


def _new_replica_group(data_group: dist.ProcessGroup) -> dist.ProcessGroup:
    """The ranks that share a data-parallel rank; every rank of the world must call."""
    owners: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(owners, data_group.rank())
    members = [[rank for rank, owner in enumerate(owners) if owner == replica] for replica in range(data_group.size())]
    return [dist.new_group(ranks, timeout=COLLECTIVE_TIMEOUT) for ranks in members][data_group.rank()]


def _destroy_groups() -> None:
    """Give back what an earlier split holds: a gloo group keeps threads and connections of its own."""
    from megatron.core import parallel_state

    dist.barrier()  # nobody is still in a collective of theirs
    for group in {*(parallel_state._global_process_group_list or ()), _replica_group} - {None}:
        dist.destroy_process_group(group)
    parallel_state._global_process_group_list = None


def on_first_rank(work: Callable[[], Result]) -> Result:
    """What rank 0's call of `work` gives, on every rank of the world; all ranks call, after init_distributed.

    Args:
        work: takes as long as it likes; its result is plain data, pickled between own processes only.
    Raises:
        ConfigError: rank 0's, on every rank.
    """
    if dist.get_world_size() == 1:
        return work()
    group = dist.new_group(backend="gloo", timeout=FIRST_RANK_TIMEOUT)
    box: list[Any] = [None, None]
    with phases.phase(phases.ALONE):
        if dist.get_rank() == 0:
            try:
                box[0] = work()
            except ConfigError as error:
                box[1] = str(error)
        dist.broadcast_object_list(box, group=group, group_src=0)
    dist.destroy_process_group(group)
    result, line = box
    if line is not None:
        raise SettingsError(line)
    return result


def on_every_rank(work: Callable[[], None]) -> None:
    """Run `work` on each rank of the world; a fault of one becomes that of all, so that none waits for one that ended.

    Raises:
        ConfigError: the first rank's that raised one, on every rank.
    """
    line = None
    try:
        work()
    except ConfigError as error:
        line = str(error)
    lines: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(lines, line)
    for line in filter(None, lines):
        raise SettingsError(line)


class Layout:
    """This rank's place among the groups, and collectives over them. Build it after init_model_parallel."""

    def __init__(self) -> None:
        from megatron.core import parallel_state

        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.tensor_group = parallel_state.get_tensor_model_parallel_group()
        self.pipeline_group = parallel_state.get_pipeline_model_parallel_group()
        self.context_group = parallel_state.get_context_parallel_group()
        self.expert_group = parallel_state.get_expert_model_parallel_group()
        self.data_group = parallel_state.get_data_parallel_group()
        assert _replica_group is not None, "init_model_parallel comes first"
        self.replica_group = _replica_group
        self.data_parallel_rank = self.data_group.rank()
        self.data_parallel_size = self.data_group.size()
        self.is_last_stage = parallel_state.is_pipeline_last_stage()
        self.is_replica_head = self.replica_group.rank() == 0
        self.in_heads_pipeline = self.tensor_group.rank() == 0 and self.context_group.rank() == 0
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else cpu._CPU

    def _reduce(self, values: Tensor, op: Any, group: dist.ProcessGroup) -> Tensor:
        reduced = values.detach().to(self.device, copy=True)
        dist.all_reduce(reduced, op, group=group)
        return reduced.to(values.device)

    def sum_over_data_parallel(self, values: Tensor) -> Tensor:
        """Sum over the data-parallel group; every rank of it must call."""
        return self._reduce(values, dist.ReduceOp.SUM, self.data_group)

    def max_over_data_parallel(self, values: Tensor) -> Tensor:
        """Largest value over the data-parallel group; every rank of it must call."""
        return self._reduce(values, dist.ReduceOp.MAX, self.data_group)

    def sum_over_context(self, values: Tensor) -> Tensor:
        """Sum over the context-parallel group, whose ranks share a row; every rank of it must call."""
        return self._reduce(values, dist.ReduceOp.SUM, self.context_group)

    def any_over_world(self, flag: bool) -> bool:
        """True when any rank of the world says so; every rank must call."""
        votes = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return bool(votes.item())

    def share_in_replica(self, value: Any) -> Any:
        """The replica head's value on every rank of its replica (plain data; pickled between own processes only)."""
        box = [value]
        dist.broadcast_object_list(box, group=self.replica_group, group_src=0)
        return box[0]

    def share_over_world(self, value: Any) -> Any:
        """Rank 0's value on every rank (plain data; pickled between own processes only)."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def from_last_stage(self, values: Tensor) -> Tensor:
        """The last pipeline stage's tensor on every stage; same shape and dtype everywhere."""
        shared = values.to(self.device)
        dist.broadcast(shared, group=self.pipeline_group, group_src=self.pipeline_group.size() - 1)
        return shared

    def free_bytes(self) -> float:
        """Memory that this rank may still take: what its GPU has left, or its share of half of the host's.

        Not what the host has left: that changes by the minute, and a run that is started again must decide alike.
        """
        if self.device.type == "cuda":
            cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return torch.cuda.mem_get_info(self.device)[0] + cached
        limit = Path("/sys/fs/cgroup/memory.max")  # of a container
        limits = [float(limit.read_text())] if limit.exists() and limit.read_text().strip().isdigit() else []
        return min([psutil.virtual_memory().total, *limits]) / 2 / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def barrier(self) -> None:
        """Wait for every rank of the world."""
        dist.barrier()
