"""Bytes on one trainer rank and on one rollout GPU, phase by phase.

For a rank with P parameters, d data-parallel replicas (context-parallel ranks counted among them):

    bf16   weights 2 P   gradients 4 P   optimizer 12 P / d   (fp32 main weights and two moments)
    fp32   weights 4 P   gradients 4 P   optimizer  8 P / d

without the distributed optimizer d = 1. FP8 layers on Hopper keep each weight twice in FP8 (as it is and transposed):
2 bytes a parameter, beside the bf16 weight.
Source: Megatron Core user guide, "Distributed Optimizer", table of bytes a parameter (18; 6 + 12/d; 16; 8 + 8/d).

Activations of a layer are counted in nemo_jepo.actor.activations; full recompute keeps all of one layer beside it.
A pipeline's first stage holds p micro-batches, with v interleaved chunks 1 + (p - 1) / (p v) times the whole model's
layers (Korthikanti et al., arXiv 2205.05198, section 4.2.3).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from nemo_jepo.actor.activations import activation_bytes_per_token, kept_of_layer, layer_activations
from nemo_jepo.config.layouts import stage_layers
from nemo_jepo.config.schema import ModelConfig
from nemo_jepo.tools.plan.hardware import GIB
from nemo_jepo.tools.plan.shape import ModelShape

RESERVED = 4 * GIB
"""CUDA context, NCCL buffers, cuBLAS workspaces, allocator fragmentation. An assumption, not a measurement."""
SAMPLER_RESERVED = 4 * GIB
"""What vLLM takes beside weights and cache: profiled activations, CUDA graphs, CUDA context. An assumption."""
NCCL_BUFFER_BYTES = 256 * 2**20
"""Of each of two buffers at either end of a weight push (`nemo_jepo.rollout.vllm.channels`)."""
ASLEEP = 2 * GIB
"""What a sleeping vLLM server keeps on its GPU: CUDA context, CUDA graphs, NCCL buffers. An assumption."""
DEFAULT_UTILIZATION = 0.9
"""vLLM's gpu_memory_utilization where rollout.vllm.engine_args does not set it; vLLM's documented default."""

Parts = Mapping[str, float]
"""What takes how many bytes."""


@dataclass(frozen=True, slots=True)
class Phase:
    """Bytes on one GPU while something happens."""

    name: str
    parts: Parts
    capacity: float

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(self.parts.values())

    @property
    def short(self) -> float:
        """Bytes that are missing; 0 where it fits."""
        return max(0.0, self.total - self.capacity)


@dataclass(frozen=True, slots=True)
class StageParameters:
    """Parameters on one rank of a pipeline stage."""

    dense: float
    """Embedding, attention, norms, dense feed-forward: sharded over tensor-parallel ranks, replicated over the rest."""
    experts: float
    matrices: float
    """Those of both that FP8 keeps."""
    num_layers: int

    @property
    def total(self) -> float:
        """Both."""
        return self.dense + self.experts


def stage_parameters(shape: ModelShape, model: ModelConfig) -> list[StageParameters]:
    """Parameters of one rank of every pipeline stage; a tied output matrix on another stage is a copy."""
    counts = stage_layers(model, shape.num_layers)
    tensor, last = model.tensor_model_parallel_size, len(counts) - 1
    stages = []
    for stage, num_layers in enumerate(counts):
        matrices = num_layers * shape.dense_matrices / tensor
        dense = matrices + num_layers * shape.layer_vectors
        dense += shape.embedding / tensor if stage == 0 else 0
        dense += shape.hidden_size if stage == last else 0
        dense += shape.embedding / tensor if stage == last and not (shape.tied and stage == 0) else 0
        experts = num_layers * shape.num_experts * shape.expert_matrices / model.expert_model_parallel_size
        stages.append(StageParameters(dense, experts, matrices + experts, num_layers))
    return stages


def layers_in_flight(model: ModelConfig, num_layers: int, num_micro_batches: int) -> float:
    """Layers times micro-batches whose activations the first pipeline stage holds at one time.

    1F1B: min(m, p) micro-batches of L / p layers; interleaved, v chunks: L (1 + (p - 1) / (p v)).
    """
    stages, chunks = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size
    first = stage_layers(model, num_layers)[0]
    if chunks is None:
        return first * min(num_micro_batches, stages)
    return first * min(num_micro_batches, stages + (stages - 1) / chunks)


def activations(shape: ModelShape, model: ModelConfig, num_micro_batches: int, dtype_bytes: int) -> float:
    """Bytes of activations on a rank of the first stage, which holds most of them."""
    tokens = model.tokens_per_micro_batch / model.context_parallel_size
    in_flight = layers_in_flight(model, shape.num_layers, num_micro_batches)
    recomputed = (
        layer_activations(shape, model, dtype_bytes) if model.activations_checkpoint_granularity == "full" else 0
    )
    return tokens * (in_flight * kept_of_layer(shape, model, dtype_bytes) + recomputed)


def output_head(shape: ModelShape, model: ModelConfig, dtype_bytes: int, training: bool) -> float:
    """Bytes of scoring on the last stage, as nemo_jepo.actor.logprobs does it.

    A chunk's logits in fp32 and in the model's precision; the row's hidden states, gathered; for training also their
    gradient, summed in fp32. That of the output matrix is added to the gradients that the optimizer has anyway.
    """
    columns = shape.vocab_size / model.tensor_model_parallel_size
    chunk = min(model.logprob_chunk_tokens, model.tokens_per_micro_batch) * columns * (4 + dtype_bytes)
    states = model.tokens_per_micro_batch / model.context_parallel_size * shape.hidden_size * dtype_bytes
    copies = 1 + (1 + (4 / dtype_bytes if dtype_bytes < 4 else 0) if training else 0)
    return chunk + copies * states


def weight_bytes(stage: StageParameters, model: ModelConfig, dtype_bytes: int) -> float:
    """Bytes of a rank's weights, FP8 copies included."""
    return dtype_bytes * stage.total + (2 * stage.matrices if model.fp8 else 0)


def optimizer_bytes(stage: StageParameters, model: ModelConfig, world_size: int, precision: str) -> float:
    """Bytes of a rank's optimizer state."""
    each = 12 if precision == "bf16" else 8
    if not model.optim.distributed:
        return each * stage.total
    per_stage = world_size / model.pipeline_model_parallel_size
    replicas = per_stage / model.tensor_model_parallel_size
    return each * (stage.dense / replicas + stage.experts / (per_stage / model.expert_model_parallel_size))


@dataclass(frozen=True, slots=True)
class TrainerMemory:
    """What decides the trainer's memory beside shape and layout."""

    world_size: int
    precision: str
    num_micro_batches: int
    keeps_reference: bool
    """Older weights score: the initial ones, or those that the sampler has."""
    batch_tokens: float
    """Tokens of a replica's rows in one update, all of which one forward pass keeps."""
    sampler: float = 0.0
    """Bytes of an embedded sampler's weights on the rank, between steps as well."""
    sampler_cache: float = 0.0
    """Bytes of its key-value cache while it samples."""
    keeps_sampler_policy: bool = False
    """The weights that the sampler has stay as well, and are not those of the reference policy."""
    feeds_servers: bool = False
    """Weights go to servers on other GPUs."""
    server: Parts | None = None
    """Bytes of a server on the same GPU while it is awake."""


def fixed_parts(shape: ModelShape, model: ModelConfig, run: TrainerMemory) -> dict[str, float]:
    """Bytes that the fullest trainer rank holds in every phase."""
    size = 2 if run.precision == "bf16" else 4
    stage = max(stage_parameters(shape, model), key=lambda stage: stage.total)
    fixed = {
        "weights": weight_bytes(stage, model, size),
        "gradients": 4 * stage.total,
        "optimizer": optimizer_bytes(stage, model, run.world_size, run.precision),
        "embedded sampler": run.sampler,
        "sleeping server": ASLEEP if run.server else 0.0,
        "reserved": RESERVED,
    }
    kept = {"reference policy": run.keeps_reference, "sampler's policy": run.keeps_sampler_policy}
    if model.reference_policy == "gpu":
        fixed |= {name: size * stage.total for name, is_kept in kept.items() if is_kept}
    return fixed


def keeps_graph(shape: ModelShape, model: ModelConfig, run: TrainerMemory, capacity: float) -> bool:
    """Whether an update makes one forward pass, as MegatronJEPOActor.keeps_graph decides: auto takes half of what is
    free for the activations of all rows."""
    if model.update_passes == "two" or model.pipeline_model_parallel_size > 1:
        return False
    free = capacity - sum(fixed_parts(shape, model, run).values())
    return model.update_passes == "one" or _graph_bytes(shape, model, run) <= 0.5 * free


def _graph_bytes(shape: ModelShape, model: ModelConfig, run: TrainerMemory) -> float:
    """Of the activations of all rows of an update."""
    size = 2 if run.precision == "bf16" else 4
    return run.batch_tokens / model.context_parallel_size * activation_bytes_per_token(shape, model, size)


def trainer_phases(shape: ModelShape, model: ModelConfig, run: TrainerMemory, capacity: float) -> list[Phase]:
    """Bytes on the fullest trainer rank in each phase.

    The first stage has most activations, the last the output head: with an equal share of layers one rank is charged
    with both, which is at most the output head too much.

    Where a server on the same GPU is awake, the trainer has given up optimizer state and gradients; it scores a row of
    the weight sync's probe.
    """
    size = 2 if run.precision == "bf16" else 4
    fixed = fixed_parts(shape, model, run)
    tokens = model.tokens_per_micro_batch / model.context_parallel_size
    passing = {"activations": 2 * tokens * layer_activations(shape, model, size)}  # a layer's, and what it is made of
    passing["output head"] = output_head(shape, model, size, training=False)
    scoring, training = (
        passing,
        {
            "activations": activations(shape, model, run.num_micro_batches, size),
            "output head": output_head(shape, model, size, training=True),
        },
    )
    if keeps_graph(shape, model, run, capacity):
        kept = {"activations": _graph_bytes(shape, model, run) + tokens * layer_activations(shape, model, size)}
        scoring, training = passing | kept, training | kept
    swap = {"swapped weight": max(shape.embedding, shape.expert_matrices) / model.tensor_model_parallel_size * size}
    phases: dict[str, dict[str, float]] = {
        "log-probs": scoring,
        "reference log-probs": passing | swap if run.keeps_reference else {},
        "training": training,
        "weight sync": _sync(shape, size, run.feeds_servers),
        "generation": {"key-value cache": run.sampler_cache} if run.sampler_cache else {},
    }
    held = dict.fromkeys(phases, fixed)
    if run.server is not None:
        given_up = {name: fixed[name] for name in ("weights", "reserved")}
        arriving = run.server["arriving weights"]  # before the cache takes what is left
        phases["weight sync"] |= {
            "server's weights": run.server["weights"] + arriving,
            "server's own": SAMPLER_RESERVED,
        }
        phases["generation"] = passing | {"server": sum(run.server.values()) - arriving}
        held |= {"weight sync": given_up, "generation": given_up}
    return [Phase(name, _positive(held[name] | parts), capacity) for name, parts in phases.items() if parts]


def _sync(shape: ModelShape, dtype_bytes: int, feeds_servers: bool) -> dict[str, float]:
    """Of a weight sync on a replica's first rank: shards of a layer's dense part, of its experts or of a table, and the
    tensors that they become; what NCCL sends from."""
    experts = shape.num_experts * shape.expert_matrices
    largest = max(shape.embedding, shape.dense_matrices, experts) * dtype_bytes
    return {"gathered weights": 2 * largest, "packed weights": 2 * NCCL_BUFFER_BYTES if feeds_servers else 0.0}


def largest_tensor(shape: ModelShape) -> int:
    """Parameters of the largest Hugging Face tensor."""
    return max(shape.embedding, shape.hidden_size * max(shape.inner_size, shape.query_width))


def _positive(parts: Parts) -> Parts:
    return {name: value for name, value in parts.items() if value > 0}


@dataclass(frozen=True, slots=True)
class SamplerMemory:
    """Memory of one rollout GPU and how many tokens its server can keep."""

    phase: Phase
    cached_tokens: float
    """Tokens of key-value cache of the whole server."""


def sampler_memory(
    shape: ModelShape, tensor_parallel_size: int, utilization: float, longest: int, memory: float, dtype_bytes: int
) -> SamplerMemory:
    """Weights and key-value cache of one vLLM GPU; the cache gets what is left, and needs one longest sequence.

        cache = utilization * memory - weights / t - reserved,   a token takes 2 L k 2 bytes / t

    Beside all that, what weights of a push arrive in: two buffers, each full but for the largest tensor, and that.

    Source: vLLM's documentation of gpu_memory_utilization; Kwon et al., arXiv 2309.06180, for the bytes of a token.

    Args:
        tensor_parallel_size: t; key-value heads are copied where there are fewer.
        longest: tokens of the longest prompt with its generation.
        memory: bytes of the GPU.
    """
    weights = shape.num_parameters * dtype_bytes / tensor_parallel_size
    shards = min(tensor_parallel_size, shape.num_kv_heads)
    token = shape.key_value_bytes(dtype_bytes) / shards
    left = utilization * memory - weights - SAMPLER_RESERVED
    cache = max(left, longest * token)
    arriving = 2 * (NCCL_BUFFER_BYTES + largest_tensor(shape) * dtype_bytes)
    parts = {"weights": weights, "key-value cache": cache, "reserved": SAMPLER_RESERVED, "arriving weights": arriving}
    capacity = min(memory, utilization * memory + arriving)
    return SamplerMemory(Phase("generation", parts, capacity), math.floor(cache / token))
