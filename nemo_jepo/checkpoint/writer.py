"""Save and load checkpoints: Megatron's torch_dist format plus the loop's own few numbers.

    <run>/checkpoints/step_000040/   .metadata, __0_0.distcp, ..., common.pt   dist_checkpointing, any parallel layout
                                     config.json, tokenizer.json, ...   what another run needs to start from it
                                     loop.json        data position and the like
                                     complete.json    name, size and checksum of every file; written last
    <run>/checkpoints/latest         the name of the newest whole checkpoint

A checkpoint is written under a hidden name and renamed when complete, so a killed save is never taken for a whole one.
Every function that says "all ranks" is collective over the world.
"""

import json
import os
import pickle
import secrets
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, resource_tracker
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from nemo_jepo.checkpoint.format import (
    mark_complete,
    note_checksums,
    remove,
    step_of,
    whole_checkpoints,
)
from nemo_jepo.checkpoint.reader import load_shards
from nemo_jepo.config.errors import RunError
from nemo_jepo.config.reading import FULL, LARGE_FILE, read_json
from nemo_jepo.utils.files import write_atomically
from nemo_jepo.utils.processes import die_with_parent

LOOP_STATE = "loop.json"
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass(frozen=True, slots=True)
class RunState:
    """What a checkpoint holds of a run."""

    sharded: dict[str, Any]
    """Weights, optimizer, schedule as dist_checkpointing shards."""
    loop: dict[str, Any]
    """The loop's own numbers: plain JSON data, the same on every rank."""


class CheckpointNotWritten(RunError):
    """A rank could not write its part of a checkpoint; those before it are whole."""


@contextmanager
def _told_in_one_line() -> Iterator[None]:
    """Megatron's exception, which holds that of every rank that failed, as CheckpointNotWritten."""
    try:
        yield
    except CheckpointException as error:
        causes = {str(cause).splitlines()[0] for cause, _ in error.failures.values()}
        is_full = any(getattr(cause, "errno", None) in FULL for cause, _ in error.failures.values())
        fix = "make room" if is_full else "look after the disk"
        rest = f"Older checkpoints are whole; {fix} and start the run again."
        line = f"a checkpoint could not be written ({', '.join(sorted(causes))}). {rest}"
        raise CheckpointNotWritten(line) from error


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time, and knows the newest. Every method: all ranks.

    A background save copies the state at once (GPU: to host memory; CPU: by forking) and writes it in processes of
    their own. It becomes a checkpoint in the first later call that finds it written on every rank.
    """

    def __init__(
        self, folder: Path, keep: int, write_model_files: Callable[[Path], None], in_background: bool = False
    ) -> None:
        """A writer of no checkpoint yet.

        Args:
            folder: the run's checkpoints folder.
            keep: whole checkpoints that stay, the newest included; older ones are deleted.
            write_model_files: puts config.json and the tokenizer beside the weights; called on rank 0.
            in_background: saves return as soon as the state is copied.
        """
        self._folder = folder
        self._keep = keep
        self._write_model_files = write_model_files
        self._in_background = in_background
        self._background = AsyncCallsQueue()
        self.saved_step = 0
        """Optimizer steps in the newest checkpoint of the run, also while it is being written."""

    @property
    def pending(self) -> bool:
        """True while a background save is not a checkpoint yet; the same on every rank."""
        return self._background.get_num_unfinalized_calls() > 0

    def save(self, step: int, state: Callable[[], RunState], last: bool = False) -> None:
        """Write a checkpoint, after the one before it is finished; nothing more where the run has one of this step.

        Args:
            step: optimizer steps done.
            state: makes what is saved; called when the save begins.
            last: the run ends here, so every checkpoint is whole on return.
        Raises:
            CheckpointNotWritten: on every rank, where any could not write its part; also in the two below.
        """
        self.wait()
        if step == self.saved_step:
            return
        staging, final = _new_folder(self._folder, step), self._folder / f"step_{step:06d}"
        _start_results_queue()
        held = state()
        request = dist_checkpointing.save(held.sharded, str(staging), async_sharded_save=True)
        _write_small_files(staging, held.loop, self._write_model_files)
        request.add_finalize_fn(partial(_complete, staging, final, self._keep))
        if request.async_fn is not None:  # this rank has something to write
            write = partial(_write_and_note_checksums, request.async_fn, staging, dist.get_rank(), os.getpid())
            request = request._replace(async_fn=write)
        if self._in_background and not last:
            self._background.schedule_async_request(request)
        else:
            with _told_in_one_line():
                request.execute_sync()
        self.saved_step = step

    def complete_if_written(self) -> None:
        """Make a checkpoint of the background save if every rank has written its part."""
        if self.pending:
            with _told_in_one_line():
                self._background.maybe_finalize_async_calls()

    def wait(self) -> None:
        """Return when the background save, if there is one, is a checkpoint."""
        with _told_in_one_line():
            self._background.maybe_finalize_async_calls(blocking=True)

    def resume(self, path: Path, sharded_state: dict[str, Any], verify: str = "own") -> RunState:
        """Read one of the run's checkpoints, which then is its newest; as load_checkpoint does."""
        state = load_checkpoint(path, sharded_state, verify)
        self.saved_step = step_of(path)
        return state


def save_with(
    strategy: SaveShardedStrategy,
    folder: Path,
    step: int,
    sharded_state: dict[str, Any],
    write_model_files: Callable[[Path], None],
) -> Path:
    """Write a folder's only checkpoint by another of Megatron's strategies; returns it when it is whole. All ranks.

    There is no loop to resume; write_model_files is as in CheckpointWriter.
    """
    staging, final, rank = _new_folder(folder, step), folder / f"step_{step:06d}", dist.get_rank()
    dist_checkpointing.save(sharded_state, str(staging), sharded_strategy=strategy)
    note_checksums(staging, rank, staging.glob(f"__{rank}_*.distcp"))
    _write_small_files(staging, {}, write_model_files)
    dist.barrier()  # every rank's checksums are there
    _complete(staging, final, keep=1)
    return final


def load_checkpoint(path: Path, sharded_state: dict[str, Any], verify: str = "own") -> RunState:
    """Read a checkpoint in the current layout, whatever layout wrote it; arguments and errors of `load_shards`."""
    return RunState(load_shards(path, sharded_state, verify), read_loop_state(path))


def read_loop_state(path: Path) -> dict[str, Any]:
    """The loop's own numbers in a checkpoint.

    Raises:
        ConfigError: they cannot be read.
    """
    return read_json("checkpoint", path / LOOP_STATE, LARGE_FILE)


def _new_folder(folder: Path, step: int) -> Path:
    """An empty hidden folder. Its name is new, for writers of a killed run may still be at work in an old one."""
    box = [folder / f".step_{step:06d}.{secrets.token_hex(4)}.partial"]
    if dist.get_rank() == 0:
        box[0].mkdir(parents=True)
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _complete(staging: Path, final: Path, keep: int) -> None:
    """Rename a folder that is written on every rank, and delete checkpoints that are no longer kept."""
    folder = final.parent
    if dist.get_rank() == 0:
        mark_complete(staging, step_of(final))
        remove(final)  # not whole, or nobody would save this step again
        os.rename(staging, final)
        write_atomically(folder / "latest", final.name)
        for old in whole_checkpoints(folder)[:-keep]:
            remove(old)
    dist.barrier()


def _write_small_files(staging: Path, loop_state: dict[str, Any], write_model_files: Callable[[Path], None]) -> None:
    """What stands beside the weights, from rank 0."""
    if dist.get_rank() == 0:
        write_model_files(staging)
        write_atomically(staging / LOOP_STATE, json.dumps(loop_state, indent=1))


def _start_results_queue() -> None:
    """Start the process in which Megatron collects its writers' results; it ends with this one, and only then.

    Megatron's own would outlive a killed run, and die of the signals that end one: Slurm and terminals send those to
    the whole process group, and the run still has to save.
    """
    if filesystem_async._results_queue is not None:
        return
    manager = SyncManager(ctx=get_context("spawn"))
    resource_tracker.ensure_running()  # starting it would unblock the signals
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)  # children inherit it
    try:
        manager.start(initializer=die_with_parent)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    filesystem_async._results_queue = _PickledQueue(manager.Queue())


class _PickledQueue:
    """What Megatron uses of a queue, with bytes in it: its keeper then need not import torch (2 s, 250 MB)."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def put(self, item: Any) -> None:
        self._queue.put(pickle.dumps(item))

    def get_nowait(self) -> Any:
        return pickle.loads(self._queue.get_nowait())


def _write_and_note_checksums(
    write: Callable[..., None], folder: Path, rank: int, writer_of: int, *shards: Any
) -> None:
    """Megatron's writer of this rank's files, then their checksums: both in the background of a background save.

    Args:
        writer_of: the run's process, from which a background save forks.
    """
    if os.getpid() != writer_of:
        die_with_parent()  # nobody would make a checkpoint of what it writes
    write(*shards)
    note_checksums(folder, rank, folder.glob(f"__{rank}_*.distcp"))
