"""What the weight stream gives in a layout."""

from typing import Any

import torch

from nemo_jepo.actor import parallel
from nemo_jepo.actor.actor import MegatronJEPOActor
from nemo_jepo.actor.model import load_hf_config
from nemo_jepo.actor.weights.load import load_stage, open_source
from nemo_jepo.actor.weights.stream import weight_stream
from nemo_jepo.config.schema import ModelConfig


def stream(job: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The stream in order, which is the same on every rank.

    Args:
        job: shape, folder or None, seed, model.
    """
    model = ModelConfig(**job["model"])
    parallel.init_model_parallel(model)
    layout = parallel.Layout()
    hf_config = load_hf_config(job["shape"])
    actor = MegatronJEPOActor(hf_config, model, "fp32", layout)
    for parameter in (p for chunk in actor.chunks for p in chunk.parameters()):
        torch.nn.init.constant_(parameter, torch.nan)  # a parameter that is not loaded shows
    source = open_source(hf_config, job["folder"], job["seed"])
    load_stage(actor.chunks, hf_config, source, layout)
    tensors = {name: tensor.clone() for name, tensor in weight_stream(actor.chunks, hf_config, layout)}
    for name, tensor in tensors.items():
        of_rank_0 = tensor.clone()
        torch.distributed.broadcast(of_rank_0, src=0)
        assert torch.equal(tensor, of_rank_0), name
    return tensors
