"""The FP8 guard over stand-in FP8 in any layout."""

from typing import Any

import torch

from nemo_jepo.actor import parallel
from nemo_jepo.actor.actor import MegatronJEPOActor
from nemo_jepo.actor.fp8_guard import guard_fp8
from nemo_jepo.actor.model import load_hf_config
from nemo_jepo.actor.scoring import score
from nemo_jepo.actor.weights.load import load_stage, open_source
from nemo_jepo.config.schema import ModelConfig, OptimConfig
from nemo_jepo.data.packing import pack
from nemo_jepo.objective.tables import group_scores
from nemo_jepo.types import SplicedBatch
from tests.distributed import fp8_stand_in
from tests.distributed.batch import GROUP_SIZE, sequences

INTERVAL, STEPS = 2, 5


def build(job: dict[str, Any], layout: parallel.Layout, **fp8: Any) -> MegatronJEPOActor:
    hf_config = load_hf_config(job["shape"])
    model = ModelConfig(tokens_per_micro_batch=32, fp8_guard_interval=INTERVAL, **job["model"], **fp8)
    actor = MegatronJEPOActor(hf_config, model, "fp32", layout)
    load_stage(actor.chunks, hf_config, open_source(hf_config, None, seed=7), layout)
    actor.start_training(OptimConfig(), 1.0, 10)
    return actor


def guarded(job: dict[str, Any]) -> dict[str, Any]:
    """What the guard reads and says in five steps, and the scores and losses that it should have read."""
    with fp8_stand_in.installed():
        return _guarded(job)


def _guarded(job: dict[str, Any]) -> dict[str, Any]:
    parallel.init_model_parallel(ModelConfig(**job["model"]))
    layout = parallel.Layout()
    first, count = sum(job["split"][: layout.data_parallel_rank]), job["split"][layout.data_parallel_rank]
    mine = [s for s in sequences() if first <= s.group < first + count]
    fp8 = {"fp8": "hybrid"}
    actor = build(job, layout, **fp8, fp8_guard_ratio=0.0, fp8_guard_action="bf16")
    bf16_actor = build(job, layout)
    quiet = build(job, layout, **fp8, fp8_guard_ratio=1e9)
    rows, batch = pack(mine, actor.row_shape), SplicedBatch(sequences=mine, group_size=GROUP_SIZE)

    def answer_logprobs(of: MegatronJEPOActor) -> list[float]:
        scores = of.get_inference_log_probs(rows, len(mine))
        return group_scores(batch, scores).answer_logprob.flatten().tolist()

    def loss(of: MegatronJEPOActor) -> float:
        weights = [torch.ones(s.chain_length + s.answer_length) for s in mine]
        of.prepare_for_training_step()
        return of.get_loss_and_metrics(rows, weights)[0]

    found: dict[str, Any] = {"fp8": answer_logprobs(actor), "bf16": answer_logprobs(bf16_actor)}
    with actor.in_bf16():
        found["switched off"] = answer_logprobs(actor)
    try:
        with actor.in_bf16():
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        found["after an exception"] = answer_logprobs(actor)
    found["valid"] = [s.valid and not s.failed for s in mine]
    found["rows"] = [row.sequence_index[row.scored_mask].unique().tolist() for row in rows]
    found["losses"] = [loss(actor), loss(bf16_actor)]

    scored = score(actor, batch)
    said: dict[str, list[str]] = {"quiet": [], "bf16": []}
    found["quiet"] = [guard_fp8(quiet, scored, step, said["quiet"].append) for step in range(STEPS)]
    found["guarded"] = [guard_fp8(actor, scored, step, said["bf16"].append) for step in range(STEPS)]
    found["without fp8"] = [guard_fp8(bf16_actor, scored, step, said["bf16"].append) for step in range(2)]
    found["said"], found["then"] = said, answer_logprobs(actor)
    found["losses"].append(loss(actor))
    return found
