"""Whole JEPO updates of tiny models in any layout; rank 0 writes what came out. Run by test_layouts.

    python update_worker.py jobs.json     (once a rank; jobs: output file -> job)

The step's learning rate is 1 and Adam's epsilon 1, so the first update of a weight is g / (|g| + 1): the weights
after it show every gradient, also where the distributed optimizer keeps only a shard of it.
"""

import json
import sys
from contextlib import nullcontext
from unittest import mock

import torch
from safetensors.torch import save_file

from nemo_jepo.actor import parallel

parallel.init_distributed()

from nemo_jepo.actor import model as actor_model  # noqa: E402
from nemo_jepo.actor.actor import MegatronJEPOActor  # noqa: E402
from nemo_jepo.actor.model import load_hf_config  # noqa: E402
from nemo_jepo.actor.weights.load import load_stage, open_source  # noqa: E402
from nemo_jepo.actor.weights.stream import weight_stream  # noqa: E402
from nemo_jepo.config.schema import ModelConfig, OptimConfig  # noqa: E402
from nemo_jepo.data.packing import pack, padded_rows  # noqa: E402
from nemo_jepo.objective.records import Scored, UpdateRule  # noqa: E402
from nemo_jepo.objective.tables import group_scores  # noqa: E402
from nemo_jepo.objective.update import sample_weights, token_weights  # noqa: E402
from nemo_jepo.types import Spliced  # noqa: E402


def build(job: dict, layout: parallel.Layout, model: ModelConfig, seed: int) -> MegatronJEPOActor:
    hf_config = load_hf_config(job["hf_config"])
    actor = MegatronJEPOActor(hf_config, model, job.get("precision", "fp32"), layout)
    source = open_source(hf_config, job.get("path"), seed)
    load_stage(actor.chunks, hf_config, source, layout)
    return actor


def share(job: dict, layout: parallel.Layout) -> list[Spliced]:
    """This replica's groups: job["split"] says how many prompts each data-parallel rank gets."""
    first = sum(job["split"][: layout.data_parallel_rank])
    count = job["split"][layout.data_parallel_rank]
    sequences = [Spliced(**{k: tuple(v) if isinstance(v, list) else v for k, v in s.items()}) for s in job["sequences"]]
    return [s for s in sequences if first <= s.group < first + count]


def update(job: dict) -> tuple[dict[str, torch.Tensor], parallel.Layout]:
    model = ModelConfig(**job["model"])
    parallel.init_model_parallel(model)
    layout = parallel.Layout()
    rule = UpdateRule(**job["rule"])
    actor = build(job, layout, model, seed=7)
    # Another model as reference policy: its log-probs differ, so the KL term is not zero.
    reference_actor = build(job, layout, model, seed=8)
    sequences = share(job, layout)
    if job.get("padded"):
        rows = padded_rows(sequences, model.tokens_per_micro_batch)
    else:
        rows = pack(sequences, model.tokens_per_micro_batch, model.segment_multiple)
    actor.start_training(OptimConfig(**job["optim"]), job["clip"], 10)
    before = {name: tensor.clone() for name, tensor in weight_stream(actor.chunks, actor.hf_config, layout)}

    scores = actor.get_inference_log_probs(rows, len(sequences))
    reference = reference_actor.get_inference_log_probs(rows, len(sequences))
    groups = group_scores(sequences, scores, reference, None, job["group_size"])
    coefficients = sample_weights(rule, groups, layout.sum_over_data_parallel, layout.max_over_data_parallel)
    scored = Scored(sequences=sequences, rows=rows, policy=scores, reference=reference, groups=groups)
    weights = token_weights(rule, scored, coefficients)
    metrics = actor.train_step(rows, weights)

    after = dict(weight_stream(actor.chunks, actor.hf_config, layout))
    out = {f"moved/{name}": (tensor - before[name]).contiguous() for name, tensor in after.items()}
    out |= {f"before/{name}": tensor for name, tensor in before.items()}
    out |= {name: torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}
    flat = [value for values in scores.policy_logprobs for value in values.tolist()]
    out["logprobs"] = torch.tensor(flat, dtype=torch.float64)
    return out, layout


if __name__ == "__main__":
    for file, job in json.load(open(sys.argv[1])).items():
        local = mock.patch.object(actor_model, "use_transformer_engine", lambda: False)
        with local if job.get("local_layers") else nullcontext():
            out, layout = update(job)
        if layout.rank == 0:
            save_file(out, file)
