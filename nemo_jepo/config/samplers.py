"""What kind of sampler is X: the one table that settings, the planner and the doctor read. No torch here.

The class of a sampler is chosen in `nemo_jepo.rollout.build`, its defaults stand in conf/rollout/.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerKind:
    """What the rest of the program must know of a sampler to serve it."""

    has_servers: bool = False
    """Samples in servers beside the trainer, which hold their own copy of the weights and can serve a judge."""
    can_truncate: bool = False
    """Reads rollout.top_p and rollout.top_k."""
    can_run_ahead: bool = False
    """Can sample for later steps while the trainer works (rollout.max_staleness)."""
    shares_gpus: bool = False
    """Its servers are on the trainers' own GPUs and sleep while those train."""


SAMPLERS = {
    "embedded": SamplerKind(),
    "vllm": SamplerKind(has_servers=True, can_truncate=True, can_run_ahead=True),
    "vllm_colocated": SamplerKind(has_servers=True, can_truncate=True, shares_gpus=True),
}
"""rollout.name -> kind."""
