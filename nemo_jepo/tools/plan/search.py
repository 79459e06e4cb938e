"""The layout with the shortest step, and the smallest change that makes a run fit."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.layouts import check_layout
from nemo_jepo.config.schema import Config, ModelConfig
from nemo_jepo.tools.plan.estimate import Cluster, Plan, cluster_of, estimate, planned_shape
from nemo_jepo.tools.plan.hardware import GPU
from nemo_jepo.tools.plan.memory import DEFAULT_UTILIZATION
from nemo_jepo.tools.plan.shape import ModelShape
from nemo_jepo.tools.plan.workload import MeanLengths

SIZES = (1, 2, 4, 8, 16, 32, 64)
PIPELINES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
_MOST_SPLITS = 12
"""Ways to divide the nodes between trainer and rollouts that are tried."""


def _rules(shape: ModelShape) -> dict[str, int]:
    """The shape as check_layout reads it."""
    return {
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.query_width // shape.head_size,
        "num_key_value_heads": shape.num_kv_heads,
        "intermediate_size": shape.inner_size,
        "num_experts": shape.num_experts,
    }


def _layouts(config: Config, shape: ModelShape, cluster: Cluster) -> Iterator[ModelConfig]:
    """Layouts of the trainer that keep Megatron's rules, those without context parallelism first.

    Tensor- and context-parallel ranks share a node.
    """
    world, prompts = cluster.world_size, config.trainer.jepo.num_prompts_per_step
    for context, tensor, pipeline in itertools.product(SIZES[:4], SIZES[:4], PIPELINES):
        ranks = tensor * context * pipeline
        if tensor * context > cluster.devices or world % ranks or prompts % (world // ranks):
            continue
        first, last = _outer_stages(shape.num_layers, pipeline)
        for chunks, expert in itertools.product((None, 2, 4, 5), SIZES if shape.num_experts else (1,)):
            model = dataclasses.replace(
                config.model,
                tensor_model_parallel_size=tensor,
                pipeline_model_parallel_size=pipeline,
                virtual_pipeline_model_parallel_size=chunks,
                context_parallel_size=context,
                expert_model_parallel_size=expert,
                sequence_parallel=tensor > 1,
                num_layers_in_first_pipeline_stage=first,
                num_layers_in_last_pipeline_stage=last,
            )
            if _keeps_rules(model, shape, world):
                yield model


def _outer_stages(num_layers: int, stages: int) -> tuple[int | None, int | None]:
    """Layers of the first and the last stage where equal shares do not work out."""
    if stages < 3 or num_layers % stages == 0:
        return None, None
    outer = num_layers - round(num_layers / stages) * (stages - 2)
    return max(1, outer - outer // 2), max(1, outer // 2)


def _keeps_rules(model: ModelConfig, shape: ModelShape, world_size: int) -> bool:
    try:
        check_layout(model, _rules(shape))
        model.data_parallel_size(world_size)
    except ConfigError:
        return False
    return True


def _saving_memory(model: ModelConfig, places: Sequence[str]) -> Iterator[ModelConfig]:
    """The layout with less and less memory, and slower and slower."""
    for recompute, place in itertools.product((None, "full"), places):
        yield dataclasses.replace(model, reference_policy=place, activations_checkpoint_granularity=recompute)


def _merit(plan: Plan) -> tuple[float, float]:
    """What a search minimises: bytes that are missing, then seconds."""
    return plan.worst.short, plan.step_seconds


def best_trainer(config: Config, cluster: Cluster, means: MeanLengths) -> Plan | None:
    """The fastest trainer layout that fits, else the one that is short of least; None where none keeps the rules.

    Context parallelism is chosen only where nothing fits without it: the planner page shows that the model flatters it.
    """
    best: Plan | None = None
    places = ("cpu",) if config.rollout.kind.shares_gpus else ("gpu", "cpu")
    for layout in _layouts(config, planned_shape(config), cluster):
        if best and best.fits and layout.context_parallel_size > best.config.model.context_parallel_size:
            break
        for model in _saving_memory(layout, places):
            plan = estimate(dataclasses.replace(config, model=model), cluster, means)
            best = plan if best is None or _merit(plan) < _merit(best) else best
            if plan.fits or (plan.sampler_memory and plan.sampler_memory.short):
                break
    return best


def best_plan(config: Config, gpu: GPU, gpus_per_node: int, nodes: int, means: MeanLengths) -> Plan | None:
    """The shortest step on so many nodes, over trainer layouts, splits and samplers; if none fits, the nearest.

    Kept as the config has them: batch, lengths, tokens_per_micro_batch, precision, rollout.max_staleness. None where
    no layout at all keeps the rules.

    Raises:
        ConfigError: a rule is broken that no layout mends.
    """
    found = (best_trainer(*split, means) for split in _splits(config, gpu, gpus_per_node, nodes))
    return min((plan for plan in found if plan), key=_merit, default=None)


def _splits(config: Config, gpu: GPU, gpus_per_node: int, nodes: int) -> Iterator[tuple[Config, Cluster]]:
    """Ways to divide the machines between trainer and samplers."""
    sizes = [size for size in SIZES if size <= gpus_per_node]
    if not config.rollout.kind.has_servers:
        yield config, Cluster(gpu, gpus_per_node, nodes, gpus_per_node, 0, 1)
    elif config.rollout.kind.shares_gpus:
        for size in sizes:
            servers = gpus_per_node // size
            yield _with_servers(config, servers, size), Cluster(gpu, gpus_per_node, nodes, gpus_per_node, 0, servers)
    elif nodes == 1:
        for devices, size in itertools.product(sizes, sizes):
            if servers := (gpus_per_node - devices) // size:
                yield _with_servers(config, servers, size), Cluster(gpu, gpus_per_node, 1, devices, 0, servers)
    else:
        for trainer_nodes, size in itertools.product(_trainer_nodes(nodes), sizes):
            chosen = _with_servers(config, config.rollout.vllm.num_servers, size)
            chosen = dataclasses.replace(chosen, trainer=dataclasses.replace(chosen.trainer, devices=gpus_per_node))
            yield chosen, cluster_of(chosen, gpu, gpus_per_node, nodes, nodes - trainer_nodes)


def _trainer_nodes(nodes: int) -> list[int]:
    """Numbers of trainer nodes that are tried: all, or on large clusters powers of two and even shares."""
    if nodes <= _MOST_SPLITS:
        return list(range(1, nodes))
    shares = {nodes * part // 8 for part in range(1, 8)}
    return sorted(shares | {2**power for power in range(nodes.bit_length()) if 2**power < nodes})


def _with_servers(config: Config, num_servers: int, size: int) -> Config:
    vllm = dataclasses.replace(config.rollout.vllm, num_servers=num_servers, tensor_parallel_size=size)
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, vllm=vllm))


def _changes(config: Config) -> Iterator[tuple[str, Config]]:
    """Single changes that save memory, those that cost least first, as overrides."""
    model, vllm = config.model, config.rollout.vllm
    of_model: dict[str, dict[str, Any]] = {
        "model.optim.distributed=true": {"optim": dataclasses.replace(model.optim, distributed=True)},
        "model.reference_policy=cpu": {"reference_policy": "cpu"},
        "model.activations_checkpoint_granularity=full": {"activations_checkpoint_granularity": "full"},
        f"model.tensor_model_parallel_size={2 * model.tensor_model_parallel_size} model.sequence_parallel=true": {
            "tensor_model_parallel_size": 2 * model.tensor_model_parallel_size,
            "sequence_parallel": True,
        },
        f"model.pipeline_model_parallel_size={2 * model.pipeline_model_parallel_size}": {
            "pipeline_model_parallel_size": 2 * model.pipeline_model_parallel_size
        },
    }
    if model.update_passes == "one":
        of_model = {"model.update_passes=auto": {"update_passes": "auto"}} | of_model
    for override, fields in of_model.items():
        changed = dataclasses.replace(model, **fields)
        if changed != model:
            yield override, dataclasses.replace(config, model=changed)
    size = 2 * vllm.tensor_parallel_size
    if config.rollout.kind.has_servers:
        servers = max(1, vllm.num_servers // 2)
        overrides = f"rollout.vllm.tensor_parallel_size={size} rollout.vllm.num_servers={servers}"
        yield overrides, _with_servers(config, servers, size)
    if config.rollout.kind.shares_gpus:
        less = round(float(vllm.engine_args.get("gpu_memory_utilization", DEFAULT_UTILIZATION)) - 0.1, 2)
        fewer = dataclasses.replace(vllm, engine_args=vllm.engine_args | {"gpu_memory_utilization": less})
        override = f"rollout.vllm.engine_args.gpu_memory_utilization={less}"
        yield override, dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, vllm=fewer))


def what_to_try(plan: Plan, means: MeanLengths, depth: int = 3) -> str | None:
    """Overrides that make the run fit on the same machines, as few as possible; None where no few do."""
    reached, seen = [("", plan.config)], {""}
    for _ in range(depth):
        following = []
        for overrides, config in reached:
            for override, changed in _changes(config):
                tried = f"{overrides} {override}".strip()
                if tried in seen or (found := _tried(changed, plan.cluster, means)) is None:
                    continue
                if found.fits:
                    return tried
                seen.add(tried)
                following.append((tried, changed))
        reached = following
    return None


def _tried(config: Config, cluster: Cluster, means: MeanLengths) -> Plan | None:
    """The plan of a changed config on the same machines; None if it breaks a rule."""
    vllm = config.rollout.vllm
    servers = cluster.rollout_nodes * (cluster.gpus_per_node // vllm.tensor_parallel_size) or vllm.num_servers
    try:
        return estimate(config, dataclasses.replace(cluster, num_servers=servers), means)
    except ConfigError:
        return None
