"""What software gets out of the hardware: every constant of the time model that is not in a datasheet.

Five are fitted, to published numbers that docs/reference/planner.md marks; the other published ones are a check. The
rest are assumptions of ordinary size, and are called so. "NeMo-RL" is its v0.3, "8B" Llama 3.1 8B on 8 H100.
"""

from collections.abc import Mapping
from dataclasses import dataclass

MATMUL_EFFICIENCY: Mapping[str, float] = {"bf16": 0.49, "fp8": 0.512}
"""Share of the tensor cores' peak that a large matrix product reaches, with everything around it that is not modelled.
bf16: fitted to NeMo-RL's 28 s of training for 8B. fp8, quantisation included: fitted to Megatron-Bridge's 14,451
tokens/s/GPU for Llama 3 8B on 8 H100."""

EXPERT_LAYER_SECONDS = 0.0142
"""Of one layer's experts in one micro-batch, forward and backward, beside its products and transfers: routing,
permutation, many small kernels. Fitted to NeMo-RL's 50 s of training for Qwen3 30B-A3B on 64 H100."""

DECODE_STEP_SECONDS = 0.0066
"""Of one decoding step of vLLM beside reading weights and cache: scheduling, launches, sampling. Fitted to NeMo-RL's
58 s of generation for 8B."""

SYNC_SECONDS = 1.0
"""Of a weight sync beside moving weights: pausing servers, dropping caches, the probe of the parity check. An
assumption."""

ENDLESS_SHARE = 0.002
"""Of generations, those that run into rollout.max_tokens whatever the mean. Chosen so that NeMo-RL's run with mean 749
lasts until its limit of 16,384 tokens, as 287 s at the pace of its 4,096-token run say it did."""

EMBEDDED_STEP_SECONDS = 0.03
"""Of one decoding step of transformers in process. An assumption."""
MEMORY_EFFICIENCY = 0.8
"""Share of the memory bandwidth that decoding reaches. An assumption."""
LINK_EFFICIENCY = 0.8
"""Share of NVLink's and the network's bandwidth that a large collective reaches. An assumption."""
ALL_REDUCE_SECONDS = 15e-6
"""Of a small all-reduce over NVLink, the latency alone. An assumption."""
HOST_COPY_EFFICIENCY = 0.7
"""Share of PCIe's bandwidth that copies from and to pinned host memory reach, both ways at once. An assumption."""
TURN_SECONDS = 3.0
"""Of a step in which servers on the trainers' GPUs wake and fall asleep: requests, memory mapping, empty caches. An
assumption."""
OTHER_SECONDS = 3.0
"""Of a step outside its phases: data, rewards, logging. NeMo-RL's published times leave (112 - 109 s, 147 - 144 s)."""


@dataclass(frozen=True, slots=True)
class Software:
    """What a training program does with rows and prompts, and which transfers it hides behind computation."""

    overlaps_gradients: bool = False
    """The reduce-scatter of gradients and the all-gather of weights."""
    overlaps_tensor_parallel: bool = False
    """All-gathers, reduce-scatters, ring transfers and the exchange of experts' tokens inside a layer."""
    head_products: int = 3
    """Matrix products of the output head in training."""
    fits_rows: bool = False
    """A row is as long as its content, and a prompt is computed once for its samples (model.share_prompts)."""


OURS = Software(fits_rows=True)
"""nemo_jepo.actor: overlap_grad_reduce is off, and so is Megatron's tp_comm_overlap."""
NEMO_RL = Software(overlaps_gradients=True)
MEGATRON_BRIDGE = Software(overlaps_gradients=True, overlaps_tensor_parallel=True)
