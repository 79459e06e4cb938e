"""Load a checkpoint that was damaged, or made to execute something, and tell what a user would read."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject

from nemo_jepo.checkpoint.format import mark_complete
from nemo_jepo.checkpoint.reader import load_shards
from nemo_jepo.checkpoint.writer import load_checkpoint
from nemo_jepo.config.errors import ConfigError
from tests.distributed.checkpoint_jobs import build, state_of, streamed


class Payload:
    """Whoever unpickles it makes a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.witness),)


def loaded(job: dict[str, Any]) -> list[dict[str, Any]]:
    """For each folder: {"line": the error} or {"state": what this rank then holds}."""
    actor = build(job)
    return [_loaded(actor, Path(path), job) for path in job["paths"]]


def _loaded(actor: Any, path: Path, job: dict[str, Any]) -> dict[str, Any]:
    weights_alone = job.get("weights_alone", False)
    shards = {"model": actor.sharded_weights()} if weights_alone else actor.sharded_state_dict(is_loading=True)
    try:
        state = load_checkpoint(path, shards, job.get("verify", "own"))
    except ConfigError as error:
        return {"line": str(error)}
    if weights_alone:
        actor.load_weights(state.sharded["model"])
        return {"state": dict(streamed(actor))}
    actor.load_state_dict(state.sharded)
    return {"state": state_of(actor)}


def object_loaded(job: dict[str, Any]) -> str:
    """Save an object that is no tensor, a payload, and load it again: what the reader says."""
    folder, witness = Path(job["folder"]), Path(job["witness"])
    folder.mkdir(exist_ok=True)
    rank, size = dist.get_rank(), dist.get_world_size()

    def shard(content: Any) -> ShardedObject:
        return ShardedObject("thing", content, (size,), (rank,))

    dist_checkpointing.save({"thing": shard(Payload(witness))}, str(folder))
    if rank == 0:
        (folder / "loop.json").write_text("{}")
        mark_complete(folder, 1)
    dist.barrier()
    try:
        load_shards(folder, {"thing": shard(None)})
    except ConfigError as error:
        return str(error)
    return "loaded"


def with_payload(file: Path, witness: Path) -> None:
    """Exchange a file of a checkpoint for one that executes something when it is unpickled."""
    if file.name == ".metadata":
        file.write_bytes(pickle.dumps(Payload(witness)))
    else:
        torch.save({"optimizer": Payload(witness)}, file)


def fuzzed(name: str, count: int, failed: str) -> tuple[int, list[str]]:
    """How many inputs of a campaign of `make fuzz` were tried, and the tracebacks of those that failed."""
    from tests.fuzz import checkpoints
    from tests.fuzz.campaigns import CAMPAIGNS
    from tests.fuzz.runner import run

    checkpoints.whole.cache_clear()  # its groups went with the job before
    result = run(name, CAMPAIGNS[name], count, 0, Path(failed))
    return result.tried, result.failures
