"""Save, find, resume and delete checkpoints: Megatron's torch_dist format plus the loop's own few numbers.

    <run>/checkpoints/step_000040/   .metadata, __0_0.distcp, ..., common.pt   dist_checkpointing, any parallel layout
                                     config.json, tokenizer.json, ...   what another run needs to start from it
                     loop.json        data position and the like
                                     complete.json    name and size of every file; written last
    <run>/checkpoints/latest         the name of the newest whole checkpoint

A checkpoint is written under a hidden name and renamed when complete, so a killed save is never taken for a whole one.
Every function that says "all ranks" is collective over the world.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing

from nemo_jepo.config import ConfigError

MARKER = "complete.json"
LOOP_STATE = "loop.json"


def save_checkpoint(
    folder: Path,
    step: int,
    sharded_state: dict[str, Any],
    loop_state: dict[str, Any],
    keep: int,
    write_model_files: Callable[[Path], None],
) -> Path:
    """Write one checkpoint and delete those that are no longer kept. All ranks.

    Args:
        folder: the run's checkpoints folder.
        sharded_state: weights, optimizer, schedule as dist_checkpointing shards.
        loop_state: plain JSON data, the same on every rank.
        keep: whole checkpoints that stay, this one included.
        write_model_files: puts config.json and the tokeniser beside the weights; called on rank 0.
    Returns:
        The checkpoint's folder.
    """
    name = f"step_{step:06d}"
    partial, final = folder / f".{name}.partial", folder / name
    if dist.get_rank() == 0:
        for leftover in (*folder.glob(".step_*.partial"), final):  # of killed saves
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(sharded_state, str(partial))
    dist.barrier()
    if dist.get_rank() == 0:
        write_model_files(partial)
        _write(partial / LOOP_STATE, json.dumps(loop_state, indent=1))
        sizes = {file.name: file.stat().st_size for file in partial.iterdir()}
        _write(partial / MARKER, json.dumps({"step": step, "files": sizes}, indent=1))
        os.rename(partial, final)
        _write(folder / "latest.partial", name)
        os.replace(folder / "latest.partial", folder / "latest")
        for old in whole_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def whole_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in a run's checkpoints folder, oldest first."""
    return [path for path in sorted(folder.glob("step_*"), key=step_of) if _fault(path) is None]


def step_of(checkpoint: Path) -> int:
    """Optimizer steps in a checkpoint, by its name."""
    return int(checkpoint.name.removeprefix("step_"))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, None without one. A broken `latest` is passed over."""
    checkpoints = whole_checkpoints(folder)
    return checkpoints[-1] if checkpoints else None


def is_checkpoint(path: Path) -> bool:
    """True for a folder that this program wrote as a checkpoint, whole or not."""
    return (path / MARKER).exists() or (path / ".metadata").exists()


def load_checkpoint(path: Path, sharded_state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a checkpoint in the current layout, whatever layout wrote it. All ranks.

    Args:
        path: one checkpoint folder.
        sharded_state: shards of the state to fill; parts of a checkpoint that it leaves out are not read.
    Returns:
        (state with tensors filled in, loop state).
    Raises:
        ConfigError: the checkpoint is not whole; says which file.
    """
    require_whole(path)
    state = dist_checkpointing.load(sharded_state, str(path))
    return state, json.loads((path / LOOP_STATE).read_text())


def require_whole(path: Path) -> None:
    """Raise ConfigError, naming what is missing, unless the folder is a complete checkpoint."""
    fault = _fault(path)
    if fault is not None:
        raise ConfigError("checkpoint", str(path), fault, "Use another checkpoint")


def _fault(path: Path) -> str | None:
    """What keeps a folder from being a whole checkpoint, None when it is one."""
    try:
        sizes = json.loads((path / MARKER).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return f"has no readable {MARKER}: it was never finished"
    for name, size in sizes.items():
        file = path / name
        if not file.exists() or file.stat().st_size != size:
            return f"{name} is missing or has another size than when it was written"
    return None


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
