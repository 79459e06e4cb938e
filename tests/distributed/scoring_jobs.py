"""Scores, gradients and weights of a Hugging Face folder in the actor."""

from typing import Any

import torch

from nemo_jepo.actor import parallel
from nemo_jepo.actor.actor import MegatronJEPOActor
from nemo_jepo.actor.model import load_hf_config
from nemo_jepo.actor.weights.load import load_stage, open_source
from nemo_jepo.actor.weights.stream import weight_stream
from nemo_jepo.config.schema import ModelConfig, OptimConfig
from nemo_jepo.data.packing import pack
from tests.support.hf_models import scored_sequences


def scores_and_gradients(job: dict[str, Any]) -> dict[str, torch.Tensor]:
    """logprob/i and entropy/i of every sequence; grad/NAME of every weight where the job has token weights."""
    model = ModelConfig(tokens_per_micro_batch=256, logprob_chunk_tokens=50, **job["model"])
    parallel.init_model_parallel(model)
    layout = parallel.Layout()
    hf_config = load_hf_config(job["folder"])
    actor = MegatronJEPOActor(hf_config, model, job["precision"], layout)
    source = open_source(hf_config, job["folder"], seed=0)
    load_stage(actor.chunks, hf_config, source, layout)
    sequences = scored_sequences()
    rows = pack(sequences, actor.row_shape)
    scores = actor.get_inference_log_probs(rows, len(sequences))
    out = {f"logprob/{i}": values for i, values in enumerate(scores.policy_logprobs)}
    out |= {f"entropy/{i}": values for i, values in enumerate(scores.entropies)}
    if job["token_weights"]:
        # Not the distributed optimizer, which leaves a rank its shard of the sum over replicas (of experts: TP ranks).
        actor.start_training(OptimConfig(distributed=False), 0.0, 10)
        actor.prepare_for_training_step()
        loss, _ = actor.get_loss_and_metrics(rows, job["token_weights"])
        with torch.no_grad():  # the weight stream then gives the gradients under their Hugging Face names
            for parameter in (p for chunk in actor.chunks for p in chunk.parameters()):
                parameter.copy_(parameter.main_grad)
        out |= {f"grad/{name}": tensor for name, tensor in weight_stream(actor.chunks, hf_config, layout)}
        out["loss"] = torch.tensor(loss, dtype=torch.float64)
    return {name: tensor.cpu() for name, tensor in out.items()}
