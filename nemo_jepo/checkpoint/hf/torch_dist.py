"""Megatron's torch_dist checkpoints, written and read one tensor at a time.

Megatron-core's own writer copies every tensor that is a part of another (each half of fc1, so half of the model) before
its processes write them, and its reader joins those halves in new memory; both come on top of the rank's part.
"""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from nemo_jepo.checkpoint.reader import load_shards
from nemo_jepo.config.errors import ConfigError


class _Unwritten(OSError):
    """(file, what is wrong): it travels between ranks, which a ConfigError cannot."""


class SerialSave(SaveShardedStrategy):
    """The `sharded_strategy` of dist_checkpointing.save that holds one tensor beside the rank's part."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    @property
    def can_handle_sharded_objects(self) -> bool:
        return True

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        """Write this rank's shards; collective over the world.

        Raises:
            ConfigError: on every rank, where the disk of one does not take a tensor; names the tensor and the file.
        """
        shards, *_ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        try:
            dcp.save(mcore_to_pyt_state_dict(shards), storage_writer=_Writer(checkpoint_dir), planner=planner)
        except CheckpointException as error:
            first, _ = next(iter(error.failures.values()))
            if isinstance(first, _Unwritten):
                file, rule = first.args
                raise ConfigError("CHECKPOINT", file, rule, "Make room on that disk, or use another one") from error
            raise first from error


class _Writer(dcp.FileSystemWriter):
    """Writes a rank's tensors into one file, in their order."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0.distcp"
        file, results, writing = Path(self.path) / name, [], "header"
        try:
            with file.open("wb") as stream:
                for item in plan.items:
                    writing = item.index.fqn
                    data = planner.resolve_data(item)
                    if isinstance(data, torch.Tensor):
                        data = _alone(data.detach().cpu())
                    format_ = SerializationFormat.TORCH_SAVE
                    results.append(_write_item(self.transforms, stream, data, item, name, format_))
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise _Unwritten(str(file), f"tensor {writing} cannot be written ({error})") from error
        written: Future[list[WriteResult]] = Future()
        written.set_result(results)
        return written


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with memory of its own, because torch.save writes all memory of which a tensor is a part."""
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


def load_in_place(checkpoint: Path, sharded_weights: dict[str, Any], verify: str = "own") -> None:
    """Read a checkpoint into the parameters that `sharded_weights` describes. All ranks.

    Args:
        sharded_weights: a model's sharded_state_dict, which is used up.
        verify: checkpoint.verify_on_load.
    Raises:
        ConfigError: as `load_shards`.
    """
    apply_factories(sharded_weights)  # halves of fc1, as views of the parameter: nothing is left to join
    load_shards(checkpoint, {"model": sharded_weights}, verify)
