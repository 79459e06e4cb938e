"""What the weight stream gives in several layouts. Run by test_stream.

    python stream_worker.py jobs.json     (once a rank; jobs: output file -> {shape, folder or null, seed, model})

Rank 0 writes its stream in order; every other rank checks that it was given the same.
"""

import json
import sys

import torch
from safetensors.torch import save_file

from nemo_jepo.actor import parallel

parallel.init_distributed()

from nemo_jepo.actor.actor import MegatronJEPOActor  # noqa: E402
from nemo_jepo.actor.model import load_hf_config  # noqa: E402
from nemo_jepo.actor.weights.load import load_stage, open_source  # noqa: E402
from nemo_jepo.actor.weights.stream import weight_stream  # noqa: E402
from nemo_jepo.config.schema import ModelConfig  # noqa: E402


def stream(job: dict) -> dict[str, torch.Tensor]:
    model = ModelConfig(**job["model"])
    parallel.init_model_parallel(model)
    layout = parallel.Layout()
    hf_config = load_hf_config(job["shape"])
    actor = MegatronJEPOActor(hf_config, model, "fp32", layout)
    for parameter in (p for chunk in actor.chunks for p in chunk.parameters()):
        torch.nn.init.constant_(parameter, torch.nan)  # a parameter that is not loaded shows
    source = open_source(hf_config, job["folder"], job["seed"])
    load_stage(actor.chunks, hf_config, source, layout)
    return {name: tensor.clone() for name, tensor in weight_stream(actor.chunks, hf_config, layout)}


if __name__ == "__main__":
    for file, job in json.load(open(sys.argv[1])).items():
        tensors = stream(job)
        for name, tensor in tensors.items():
            of_rank_0 = tensor.clone()
            torch.distributed.broadcast(of_rank_0, src=0)
            assert torch.equal(tensor, of_rank_0), f"rank {torch.distributed.get_rank()}: {name}"
        if torch.distributed.get_rank() == 0:
            save_file(tensors, file, metadata={"order": json.dumps(list(tensors))})
