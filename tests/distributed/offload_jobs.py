"""Updates between which the trainer's memory is given up and taken back, or not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nemo_jepo.actor.actor import MegatronJEPOActor
from nemo_jepo.checkpoint import writer as checkpoint
from nemo_jepo.data.packing import pack
from tests.distributed.batch import sequences
from tests.distributed.checkpoint_jobs import build, inner_optimizers, run_state, state_of, update, write_model_files


def held_bytes(actor: MegatronJEPOActor) -> dict[str, int]:
    """Bytes of the storages under the weights, and under everything else that training keeps beside them."""
    weights = [parameter for chunk in actor.chunks for parameter in chunk.parameters()]
    kept = [parameter.main_grad for parameter in weights]
    for optimizer in inner_optimizers(actor._optimizer):
        for group in optimizer.param_groups:
            kept += group["params"]
            kept += [parameter.grad for parameter in group["params"] if parameter.grad is not None]
        kept += [value for state in optimizer.state.values() for value in state.values()]
    of_weights = {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in weights}
    kept = [one for one in kept if torch.is_tensor(one) and one.device == weights[0].device]
    of_others = {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in kept}
    return {
        "weights": sum(of_weights.values()),
        "others": sum(size for key, size in of_others.items() if key not in of_weights),
    }


def give_and_take(actor: MegatronJEPOActor, look: Callable[[], None] = lambda: None) -> dict[str, dict[str, int]]:
    """Release, score as the weight sync's probe does, take back; the bytes before, meanwhile and after."""
    bytes_held = {"before": held_bytes(actor)}
    look()
    actor.release_memory()
    look()
    bytes_held["meanwhile"] = held_bytes(actor)
    batch = sequences()[actor.layout.data_parallel_rank :: actor.layout.data_parallel_size]
    scores = actor.get_inference_log_probs(pack(batch, actor.row_shape), len(batch))
    assert all(logprobs.isfinite().all() for logprobs in scores.policy_logprobs)
    actor.take_back_memory()
    return bytes_held | {"after": held_bytes(actor)}


def given_and_taken(job: dict[str, Any]) -> dict[str, Any]:
    """After an update: the bytes before, meanwhile and after, on a GPU those that are allocated; what changed."""
    actor = build(job)
    update(actor)
    before, allocated = state_of(actor), []
    sizes = give_and_take(actor, lambda: allocated.append(torch.cuda.memory_allocated()))
    after = state_of(actor)
    changed = [part for part in before if not torch.equal(before[part], after[part])]
    return {"sizes": sizes, "allocated": allocated, "changed": changed}


def trained(job: dict[str, Any]) -> dict[str, Any]:
    """Three updates and a save after the second: the metrics of each, the state, and the bytes at each giving up."""
    actor, sizes, metrics = build(job), [], []
    if "resume" in job:
        state = checkpoint.load_checkpoint(Path(job["resume"]), actor.sharded_state_dict(is_loading=True))
        actor.load_state_dict(state.sharded)
    while actor.num_steps < 3:
        if job["shares"]:
            sizes.append(give_and_take(actor))
        metrics.append(update(actor))
        if actor.num_steps == 2:
            writer = checkpoint.CheckpointWriter(Path(job["save"]), 1, write_model_files)
            writer.save(2, lambda: run_state(actor), last=True)
    return {"metrics": metrics, "state": state_of(actor), "sizes": sizes}
