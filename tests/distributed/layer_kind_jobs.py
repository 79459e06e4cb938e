"""A checkpoint of one kind of layers, read into the other kind.

Transformer Engine's norms keep extra state beside their weights. A norm that does so stands in for them.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from nemo_jepo.actor import model as actor_model
from nemo_jepo.actor import parallel
from nemo_jepo.actor.actor import MegatronJEPOActor
from nemo_jepo.actor.model import load_hf_config
from nemo_jepo.actor.weights.load import load_stage, open_source
from nemo_jepo.actor.weights.stream import weight_stream
from nemo_jepo.checkpoint.writer import CheckpointWriter, RunState, load_checkpoint
from nemo_jepo.config.schema import ModelConfig


class NormWithExtraState(actor_model.PackedRMSNorm):
    """As Transformer Engine's, which is an operation with a state."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.zeros(1)

    def set_extra_state(self, state: Any) -> None: ...


def build(shape: dict[str, Any], extra_state: bool, seed: int) -> MegatronJEPOActor:
    model = ModelConfig(tokens_per_micro_batch=64)
    parallel.init_model_parallel(model)
    hf_config, layout = load_hf_config(shape), parallel.Layout()
    norm = mock.patch.object(actor_model, "PackedRMSNorm", NormWithExtraState)
    with norm if extra_state else nullcontext():
        actor = MegatronJEPOActor(hf_config, model, "fp32", layout)
    load_stage(actor.chunks, hf_config, open_source(hf_config, None, seed), layout)
    return actor


def weights(actor: MegatronJEPOActor) -> dict[str, torch.Tensor]:
    stream = weight_stream(actor.chunks, actor.hf_config, actor.layout)
    return {name: tensor.clone() for name, tensor in stream}


def carry(saved: MegatronJEPOActor, read: MegatronJEPOActor, folder: Path) -> None:
    """Give one actor's weights to another in a checkpoint."""
    writer = CheckpointWriter(folder, keep=1, write_model_files=lambda path: None)
    writer.save(1, lambda: RunState({"model": saved.sharded_weights()}, {}), last=True)
    state = load_checkpoint(folder / "step_000001", {"model": read.sharded_weights()})
    read.load_weights(state.sharded["model"])


def crossed(job: dict[str, Any]) -> dict[str, Any]:
    """Weights that were saved and weights that were read, and the names in the file."""
    saved = build(job["shape"], job["extra_state"], seed=7)
    read = build(job["shape"], not job["extra_state"], seed=8)
    carry(saved, read, Path(job["folder"]))
    names = [shard.key for shard in saved.sharded_weights()["chunk_0"].values() if hasattr(shard, "key")]
    return {"saved": weights(saved), "read": weights(read), "names": names}
