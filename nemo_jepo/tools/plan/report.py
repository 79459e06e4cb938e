"""A plan as a table on the console, and as one JSON object."""

import textwrap
from typing import Any

from nemo_jepo.tools.plan.calibration import ENDLESS_SHARE
from nemo_jepo.tools.plan.estimate import Plan
from nemo_jepo.tools.plan.hardware import GIB

LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "context_parallel_size",
    "expert_model_parallel_size",
    "sequence_parallel",
    "activations_checkpoint_granularity",
    "reference_policy",
)


def overrides(plan: Plan) -> list[str]:
    """Settings that give this layout, as Hydra overrides."""
    model, cluster, vllm = plan.config.model, plan.cluster, plan.config.rollout.vllm
    chosen = {f"model.{name}": getattr(model, name) for name in LAYOUT}
    chosen |= {"trainer.num_nodes": cluster.trainer_nodes, "trainer.devices": cluster.devices}
    if plan.config.rollout.kind.has_servers:
        chosen["rollout.vllm.tensor_parallel_size"] = vllm.tensor_parallel_size
        if not cluster.rollout_nodes:
            chosen["rollout.vllm.num_servers"] = cluster.num_servers
    return [f"{key}={_yaml(value)}" for key, value in chosen.items()]


def _yaml(value: object) -> str:
    return "null" if value is None else str(value).lower()


def as_json(plan: Plan, price: float | None, fix: str | None) -> dict[str, Any]:
    """Every number: bytes, seconds, tokens a second, GPU-hours, dollars."""
    longest, part = plan.limit
    return {
        "fits": plan.fits,
        "short_bytes": plan.worst.short,
        "short_phase": plan.worst.name if plan.worst.short else None,
        "try": fix,
        "gpu": plan.cluster.gpu.name,
        "num_gpus": plan.num_gpus,
        "trainer_gpus": plan.cluster.world_size,
        "rollout_gpus": plan.rollout_gpus,
        "parameters": plan.shape.num_parameters,
        "data_parallel_size": plan.replicas,
        "micro_batches": plan.rows.count,
        "tokens_per_micro_batch": plan.rows.tokens,
        "computed_tokens": plan.rows.count * plan.rows.tokens * plan.replicas,
        "update_passes": "one" if plan.one_pass else "two",
        "overrides": overrides(plan),
        "memory_bytes": {phase.name: dict(phase.parts) for phase in plan.trainer_memory},
        "rollout_memory_bytes": dict(plan.sampler_memory.parts) if plan.sampler_memory else None,
        "capacity_bytes": plan.cluster.gpu.memory,
        "seconds": {name: dict(parts) for name, parts in plan.seconds.items()},
        "step_seconds": plan.step_seconds,
        "tokens_per_second_per_gpu": plan.tokens_per_gpu(),
        "gpu_hours": plan.gpu_hours,
        "dollars": None if price is None else plan.gpu_hours * price,
        "limit": {"phase": longest, "part": part},
    }


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    cells = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return ["  ".join(row).rstrip() for row in cells]


def _memory_table(plan: Plan) -> list[str]:
    parts = list(dict.fromkeys(part for phase in plan.memory for part in phase.parts))
    names = [f"{phase.name} (rollout)" if phase is plan.sampler_memory else phase.name for phase in plan.memory]
    rows = [["GiB on the fullest GPU", *names]]
    for part in parts:
        rows.append([part, *(_gib(phase.parts.get(part, 0.0)) for phase in plan.memory)])
    rows.append(["total", *(_gib(phase.total) for phase in plan.memory)])
    rows.append(["of", *(_gib(phase.capacity) for phase in plan.memory)])
    return _table(rows)


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size else "-"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _time_table(plan: Plan) -> list[str]:
    rates, rows = plan.tokens_per_gpu(), [["phase", "seconds", "share", "tokens/s/GPU", "mostly"]]
    for name, parts in plan.seconds.items():
        seconds = sum(parts.values())
        rate = f"{rates[name]:,.0f}" if name in rates else "-"
        most = max(parts, key=lambda part: parts[part])
        rows.append([name, f"{seconds:.1f}", f"{seconds / plan.step_seconds:.0%}", rate, most])
    rows.append(["step", f"{plan.step_seconds:.1f}", "", f"{rates['step']:,.0f}", ""])
    return _table(rows)


def _head(plan: Plan) -> list[str]:
    cluster, work = plan.cluster, plan.work
    beside = plan.num_gpus - cluster.world_size
    samplers = f"{beside} for rollouts" if beside else "which also sample"
    num_samplers = cluster.num_servers if plan.config.rollout.kind.has_servers else plan.replicas
    rows, passes = plan.rows, "one forward pass" if plan.one_pass else "two forward passes"
    return [
        f"{plan.shape.num_parameters / 1e9:.2f}B {plan.shape.model_type} on {plan.num_gpus} x {cluster.gpu.name}: "
        f"{cluster.world_size} for the trainer, {samplers}. A model, not a measurement.",
        f"{plan.replicas} data-parallel replicas, {rows.count} micro-batches of {rows.tokens:.0f} tokens each, "
        f"{passes} an update; {num_samplers} samplers with up to {plan.decoded_together:.0f} sequences at a time.",
        f"{work.num_sequences} sequences a step: prompt {work.prompt:.0f}, generation {work.generations.mean:.0f} "
        f"(longest {work.generations.longest}, reached by {ENDLESS_SHARE:.1%} at least), answer {work.answer:.0f} "
        "tokens on average.",
    ]


def as_text(plan: Plan, price: float | None, fix: str | None) -> str:
    """The plan for people."""
    longest, part = plan.limit
    cost = f"{plan.gpu_hours:.3f} GPU-hours a step"
    if price is not None:
        cost += f", {plan.gpu_hours * price:.2f} dollars at {price:g} a GPU-hour"
    lines = [*_head(plan), "", *_memory_table(plan), "", *_time_table(plan), ""]
    lines += [f"Cost: {cost}. Limited by {longest}, mostly {part}.", *_wrapped(f"Layout: {' '.join(overrides(plan))}")]
    if plan.worst.short:
        where = "a rollout GPU" if plan.worst is plan.sampler_memory else "a trainer GPU"
        lines.append(
            f"Does not fit: short by {plan.worst.short / GIB:.1f} GiB in {plan.worst.name} on {where}. Try {fix}."
        )
    else:
        lines.append("Fits.")
    return "\n".join(lines)
