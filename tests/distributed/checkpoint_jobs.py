"""Train, save, go on; or resume and go on.

A job trains two updates, or resumes from job["resume"] with other initial weights, and saves step 2 into job["save"];
then it reports its whole state, does one more update, and reports the weights after it.
"""

import errno
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from nemo_jepo.actor import parallel
from nemo_jepo.actor.actor import MegatronJEPOActor
from nemo_jepo.actor.model import load_hf_config
from nemo_jepo.actor.weights.load import load_stage, open_source
from nemo_jepo.actor.weights.stream import weight_stream
from nemo_jepo.checkpoint import writer as checkpoint
from nemo_jepo.checkpoint.format import latest_checkpoint
from nemo_jepo.config.schema import ModelConfig, OptimConfig, SchedConfig
from nemo_jepo.data.packing import pack
from tests.distributed.batch import TINY, sequences

LOOP_STATE = {"data": {"epoch": 3, "position": 17}}
SCHEDULE = SchedConfig(name="cosine", warmup_steps=2, min_lr=0.001)


def build(job: dict[str, Any]) -> MegatronJEPOActor:
    model = ModelConfig(tokens_per_micro_batch=64, **job["model"])
    parallel.init_model_parallel(model)
    layout = parallel.Layout()
    shape = {"model_type": "llama", "tie_word_embeddings": job.get("tied", False)}
    hf_config = load_hf_config(TINY | shape | job.get("shape", {}))
    actor = MegatronJEPOActor(hf_config, model, job.get("precision", "fp32"), layout)
    source = open_source(hf_config, None, seed=8 if "resume" in job else 7)
    load_stage(actor.chunks, hf_config, source, layout)
    optim = OptimConfig(lr=0.02, weight_decay=0.1, sched=SCHEDULE, distributed=job.get("distributed", True))
    actor.start_training(optim, 1.0, 10)
    return actor


def update(actor: MegatronJEPOActor) -> dict[str, float]:
    """One step on another objective each time; data-parallel ranks share the sequences."""
    layout, batch = actor.layout, sequences()
    mine = batch[layout.data_parallel_rank :: layout.data_parallel_size]
    draw = torch.Generator().manual_seed(actor.num_steps)
    weights = [torch.randn(s.chain_length + s.answer_length, generator=draw) for s in batch]
    rows = pack(mine, actor.row_shape)
    return actor.train_step(rows, weights[layout.data_parallel_rank :: layout.data_parallel_size])


def inner_optimizers(optimizer: Any) -> Iterable[torch.optim.Optimizer]:
    """Torch's optimizers inside Megatron's; a rank may have none of some kind."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part.optimizer for part in parts if getattr(part, "optimizer", None) is not None]


def state_of(actor: MegatronJEPOActor) -> dict[str, torch.Tensor]:
    """Weights under their Hugging Face names, this rank's optimizer state, rate and step."""
    out = {f"weight/{name}": tensor.clone() for name, tensor in streamed(actor)}
    for number, optimizer in enumerate(inner_optimizers(actor._optimizer)):
        for group_number, group in enumerate(optimizer.param_groups):
            out[f"adam/{number}/{group_number}/step"] = torch.tensor(group["step"])
            for position, parameter in enumerate(group["params"]):
                out[f"adam/{number}/{group_number}/{position}/main"] = parameter.detach().clone()
                for name, tensor in optimizer.state[parameter].items():
                    out[f"adam/{number}/{group_number}/{position}/{name}"] = tensor.clone()
    out["lr"] = torch.tensor(actor._optimizer.param_groups[0]["lr"], dtype=torch.float64)
    out["num_steps"] = torch.tensor(actor.num_steps)
    return out


def streamed(actor: MegatronJEPOActor) -> Iterable[tuple[str, torch.Tensor]]:
    return weight_stream(actor.chunks, actor.hf_config, actor.layout)


def write_model_files(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def run_state(actor: MegatronJEPOActor) -> checkpoint.RunState:
    return checkpoint.RunState(actor.sharded_state_dict(), LOOP_STATE)


def die(folder: Path) -> None:
    raise KeyboardInterrupt


def save(actor: MegatronJEPOActor, job: dict[str, Any]) -> None:
    """Steps 1 to 4 where the job asks what is kept; the last attempt dies, as a killed process would."""
    writer = checkpoint.CheckpointWriter(Path(job["save"]), 2, write_model_files)
    for step in job.get("steps", [2]):
        writer.save(step, lambda: run_state(actor))
    if "dies_at" in job:
        try:
            checkpoint.CheckpointWriter(Path(job["save"]), 2, die).save(job["dies_at"], lambda: run_state(actor))
        except KeyboardInterrupt:
            return
        raise AssertionError("was to die")


def held_writer(held_rank: int, release: Path) -> Callable[..., None]:
    """A writer that on one rank does not begin before the file `release` is there."""
    write = checkpoint._write_and_note_checksums

    def hold_and_write(megatron_write, folder, rank, *shards):
        while rank == held_rank and not release.exists():
            time.sleep(0.01)
        write(megatron_write, folder, rank, *shards)  # the first of shards is the run's process

    return hold_and_write


def save_in_background(actor: MegatronJEPOActor, job: dict[str, Any]) -> None:
    """Step 2 while an update goes on: no checkpoint before every rank has written, then one of the state before it.

    Its save waits for that of step 1.
    """
    folder = Path(job["background"])
    release = folder.with_name(f"{folder.name}.release")
    writer = checkpoint.CheckpointWriter(folder, 2, write_model_files, in_background=True)
    writer.save(1, lambda: run_state(actor))
    with mock.patch.object(checkpoint, "_write_and_note_checksums", held_writer(job["held_rank"], release)):
        writer.save(2, lambda: run_state(actor))
    update(actor)
    for _ in range(20):
        writer.complete_if_written()
        time.sleep(0.01)
    assert writer.pending, "a rank has not written its share"
    assert (folder / "latest").read_text() == "step_000001"
    assert latest_checkpoint(folder).name == "step_000001"
    actor.layout.barrier()
    release.touch()
    deadline = time.monotonic() + 60
    while writer.pending and time.monotonic() < deadline:
        writer.complete_if_written()
        time.sleep(0.01)
    assert (folder / "latest").read_text() == "step_000002"


def save_on_a_full_disk(actor: MegatronJEPOActor, job: dict[str, Any]) -> None:
    """Step 1 is whole; the background writer of step 2 fails, and the call that would make a checkpoint says so."""
    folder = Path(job["full_disk"])
    writer = checkpoint.CheckpointWriter(folder, 2, write_model_files, in_background=True)
    writer.save(1, lambda: run_state(actor))
    writer.wait()
    with mock.patch.object(checkpoint.filesystem_async, "_write_item", full_disk):
        writer.save(2, lambda: run_state(actor))
    try:
        writer.wait()
    except checkpoint.CheckpointNotWritten as error:
        assert "a checkpoint could not be written" in str(error) and "No space left on device" in str(error)
        return
    raise AssertionError("was to fail")


def full_disk(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def trained(job: dict[str, Any]) -> dict[str, torch.Tensor]:
    """saved/..., the state that was saved or loaded; next/..., the metrics and the state of the update after it."""
    actor = build(job)
    if "resume" in job:
        state = checkpoint.load_checkpoint(Path(job["resume"]), actor.sharded_state_dict(is_loading=True))
        assert state.loop == LOOP_STATE
        actor.load_state_dict(state.sharded)
    else:
        for _ in range(2):
            update(actor)
    if "save" in job:
        save(actor, job)
    out = {f"saved/{name}": tensor for name, tensor in state_of(actor).items()}
    if "full_disk" in job:
        save_on_a_full_disk(actor, job)
    if "background" in job:
        save_in_background(actor, job)
    else:
        metrics = update(actor)
        out |= {f"next/metric/{name}": torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}
    out |= {f"next/{name}": tensor for name, tensor in state_of(actor).items()}
    return out
