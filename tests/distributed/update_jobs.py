"""One whole JEPO update of a tiny model in any layout.

The step's learning rate is 1 and Adam's epsilon 1, so the first update of a weight is g / (|g| + 1): the weights
after it show every gradient, also where the distributed optimizer keeps only a shard of it.
"""

from collections.abc import Sequence
from typing import Any

import torch

from nemo_jepo.actor import parallel
from nemo_jepo.actor.actor import MegatronJEPOActor
from nemo_jepo.actor.model import load_hf_config
from nemo_jepo.actor.weights.load import load_stage, open_source
from nemo_jepo.actor.weights.stream import weight_stream
from nemo_jepo.config.schema import ModelConfig, OptimConfig
from nemo_jepo.data.packing import pack, padded_rows
from nemo_jepo.objective.records import Scored, UpdateRule
from nemo_jepo.objective.tables import group_scores
from nemo_jepo.objective.update import sample_weights, token_weights
from nemo_jepo.types import Spliced, SplicedBatch
from tests.support.layer_kinds import attention_chosen_anew


def build(job: dict[str, Any], layout: parallel.Layout, model: ModelConfig, seed: int) -> MegatronJEPOActor:
    hf_config = load_hf_config(job["hf_config"])
    actor = MegatronJEPOActor(hf_config, model, job.get("precision", "fp32"), layout)
    source = open_source(hf_config, job.get("path"), seed)
    load_stage(actor.chunks, hf_config, source, layout)
    return actor


def share(job: dict[str, Any], layout: parallel.Layout) -> SplicedBatch:
    """This replica's groups: job["split"] says how many prompts each data-parallel rank gets."""
    first = sum(job["split"][: layout.data_parallel_rank])
    count = job["split"][layout.data_parallel_rank]

    def mine(sequences: Sequence[Spliced]) -> list[Spliced]:
        return [s for s in sequences if first <= s.group < first + count]

    by_token = "no_chain" in job
    return SplicedBatch(
        sequences=mine(job["sequences"]),
        group_size=job["group_size"],
        no_chain=mine(job["no_chain"]) if by_token else None,
        by_token=by_token,
    )


def update(job: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every weight before the update and its movement, the metrics, and the log-probs of this rank's sequences."""
    with attention_chosen_anew():
        return _update(job)


def _update(job: dict[str, Any]) -> dict[str, torch.Tensor]:
    model = ModelConfig(**job["model"])
    parallel.init_model_parallel(model)
    layout = parallel.Layout()
    rule = UpdateRule(**job["rule"])
    actor = build(job, layout, model, seed=7)
    # Another model as reference policy: its log-probs differ, so the KL term is not zero.
    reference_actor = build(job, layout, model, seed=8)
    batch = share(job, layout)
    everything = batch.to_score
    if job.get("padded"):
        rows = padded_rows(everything, model.tokens_per_micro_batch)
    else:
        rows = pack(everything, actor.row_shape)
    actor.start_training(OptimConfig(**job["optim"]), job["clip"], 10)
    before = {name: tensor.clone() for name, tensor in weight_stream(actor.chunks, actor.hf_config, layout)}

    scores, graph = actor.get_log_probs_with_graph(rows, len(everything), actor.keeps_graph(rows))
    # What the layout is meant to try is tried.
    if rows:
        assert bool(graph) == (model.update_passes != "two" and model.pipeline_model_parallel_size == 1)
    if layout.world_size == 1 and not job.get("padded"):
        assert model.share_prompts == any(bool((row.prompt_segment >= 0).any()) for row in rows)
    reference = reference_actor.get_inference_log_probs(rows, len(everything))
    groups = group_scores(batch, scores, reference)
    coefficients = sample_weights(rule, groups, layout.sum_over_data_parallel, layout.max_over_data_parallel)
    scored = Scored(batch=batch, rows=rows, policy=scores, reference=reference, groups=groups)
    weights = token_weights(rule, scored, coefficients)
    metrics = actor.train_step(rows, weights, graph)

    after = dict(weight_stream(actor.chunks, actor.hf_config, layout))
    out = {f"moved/{name}": tensor - before[name] for name, tensor in after.items()}
    out |= {f"before/{name}": tensor for name, tensor in before.items()}
    out |= {name: torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}
    flat = [value for values in scores.policy_logprobs for value in values.tolist()]
    out["logprobs"] = torch.tensor(flat, dtype=torch.float64)
    return {name: tensor.cpu() for name, tensor in out.items()}
