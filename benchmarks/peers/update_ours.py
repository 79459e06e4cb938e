"""nemo_jepo's update at its default settings: what `nemo_jepo.train.run_step` does between sampling and weight sync."""

import sys
from pathlib import Path

import torch

from benchmarks.peers import workload
from benchmarks.peers.worker import Channel, Metrics
from nemo_jepo.actor import parallel
from nemo_jepo.actor.actor import MegatronJEPOActor
from nemo_jepo.actor.model import load_hf_config
from nemo_jepo.actor.scoring import score
from nemo_jepo.config.schema import ModelConfig, OptimConfig
from nemo_jepo.objective.records import UpdateRule
from nemo_jepo.objective.update import sample_weights, token_weights
from nemo_jepo.setup import load_initial_weights
from nemo_jepo.types import Spliced, SplicedBatch


def spliced(work: workload.Workload) -> list[Spliced]:
    """The workload's sequences as the loop hands them on; each sample is valid."""
    return [
        Spliced(
            group=number,
            sample=sample,
            token_ids=(*group.prompt, *chain, *group.answer),
            prompt_length=len(group.prompt),
            chain_length=len(chain),
            answer_length=len(group.answer),
            valid=True,
            has_marker=True,
            generation_logprobs=(0.0,) * len(chain),
        )
        for number, group in enumerate(work.groups)
        for sample, chain in enumerate(group.chains)
    ]


def build_actor(work: workload.Workload, folder: Path) -> MegatronJEPOActor:
    """Policy and reference policy; the learning rate is 0, so that every update is the same one."""
    model = ModelConfig(hf_config=work.shape)
    parallel.init_distributed()
    parallel.init_model_parallel(model)
    actor = MegatronJEPOActor(load_hf_config(work.shape), model, "fp32", parallel.Layout())
    load_initial_weights(actor, str(folder / "reference"), model.seed, verify="none")
    actor.keep_reference_policy()
    load_initial_weights(actor, str(folder / "policy"), model.seed, verify="none")
    actor.start_training(OptimConfig(lr=0.0), 1.0, 1_000_000)
    return actor


def main(folder: Path) -> None:
    channel, work = Channel(), workload.read(folder)
    torch.set_num_threads(work.threads)
    actor, sequences, rule = build_actor(work, folder), spliced(work), UpdateRule(**work.rule)

    def update() -> Metrics:
        scored = score(actor, SplicedBatch(sequences=sequences, group_size=work.group_size), for_update=True)
        layout = actor.layout
        weights = sample_weights(rule, scored.groups, layout.sum_over_data_parallel, layout.max_over_data_parallel)
        optim = actor.train_step(scored.rows, token_weights(rule, scored, weights), scored.graph)
        computed = sum(len(row.token_ids) for row in scored.rows)
        return {"grad_norm": optim["grad_norm"], "computed_tokens": computed}

    channel.serve(update)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
