"""Scores, gradients and weights of Hugging Face folders in the actor. Run by test_against_transformers.

python scoring_worker.py jobs.json     (once a rank; jobs: output file -> job; rank 0 writes)
"""

import json
import sys

import torch
from safetensors.torch import load_file, save_file

from nemo_jepo.actor import parallel

parallel.init_distributed()

from nemo_jepo.actor.actor import MegatronJEPOActor  # noqa: E402
from nemo_jepo.actor.model import load_hf_config  # noqa: E402
from nemo_jepo.actor.weights.load import load_stage, open_source  # noqa: E402
from nemo_jepo.actor.weights.stream import weight_stream  # noqa: E402
from nemo_jepo.config.schema import ModelConfig, OptimConfig  # noqa: E402
from nemo_jepo.data.packing import pack  # noqa: E402
from tests.support.hf_models import scored_sequences  # noqa: E402


def scores_and_gradients(job: dict) -> dict[str, torch.Tensor]:
    """logprob/i and entropy/i of every sequence; grad/NAME of every weight where the job names token weights."""
    model = ModelConfig(tokens_per_micro_batch=256, logprob_chunk_tokens=50, **job["model"])
    parallel.init_model_parallel(model)
    layout = parallel.Layout()
    hf_config = load_hf_config(job["folder"])
    actor = MegatronJEPOActor(hf_config, model, job["precision"], layout)
    source = open_source(hf_config, job["folder"], seed=0)
    load_stage(actor.chunks, hf_config, source, layout)
    sequences = scored_sequences()
    rows = pack(sequences, model.tokens_per_micro_batch)
    scores = actor.get_inference_log_probs(rows, len(sequences))
    out = {f"logprob/{i}": values for i, values in enumerate(scores.policy_logprobs)}
    out |= {f"entropy/{i}": values for i, values in enumerate(scores.entropies)}
    if job["token_weights"]:
        weights = load_file(job["token_weights"])
        # Not the distributed optimizer, which leaves a rank its shard of the sum over replicas (of experts: TP ranks).
        actor.start_training(OptimConfig(distributed=False), 0.0, 10)
        actor.prepare_for_training_step()
        loss, _ = actor.get_loss_and_metrics(rows, [weights[str(i)] for i in range(len(sequences))])
        with torch.no_grad():  # the weight stream then gives the gradients under their Hugging Face names
            for parameter in (p for chunk in actor.chunks for p in chunk.parameters()):
                parameter.copy_(parameter.main_grad)
        out |= {f"grad/{name}": tensor for name, tensor in weight_stream(actor.chunks, hf_config, layout)}
        out["loss"] = torch.tensor(loss, dtype=torch.float64)
    return {name: tensor.contiguous() for name, tensor in out.items()}


if __name__ == "__main__":
    for file, job in json.load(open(sys.argv[1])).items():
        out = scores_and_gradients(job)
        if torch.distributed.get_rank() == 0:
            save_file(out, file)
