"""Seconds of the trainer: a forward pass, a training pass, the optimizer.

One micro-batch (a packed row of T tokens) on one rank of a stage with n layers; c context-parallel, t tensor-parallel
ranks; a forward pass costs 1 and a backward pass 2, and 1 more with full recompute. With one pass for scoring and
training, training is the backward pass alone:

    matrices      passes 2 n active T / (c t) / (efficiency * peak)
    attention     (1 + 2.5) n 2 q context T / (c t) / (efficiency * bf16 peak)         2.5: FlashAttention's backward
    elementwise   passes 2 bytes n (14 h / s + 3 f / t) T / c / memory bandwidth
    head          2 V h / t scored T / c  times 1, or 3 in training: weights that are known first make both gradients
                  in the forward pass, a backward pass alone computes the logits again
    transfers     (4 forward, 6 backward) (t - 1)/t T / c h 2 bytes n / link            all-gather, reduce-scatter
                  experts: A h 2 bytes, twice a pass, to other expert-parallel ranks

A pass over m rows takes (m + (p - 1) / v) times its slowest stage: the pipeline's bubble. Then gradients (4 bytes) are
reduce-scattered and weights (2 bytes) all-gathered over d replicas, (d - 1)/d of them over the slowest link.

Sources: Narayanan et al., arXiv 2104.04473, section 2.2 (bubble) and appendix (FLOP); Korthikanti et al., arXiv
2205.05198, section 4.2 (transfers); Dao, arXiv 2307.08691, section 4.1 (2.5).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from nemo_jepo.config.layouts import stage_layers
from nemo_jepo.config.schema import ModelConfig
from nemo_jepo.tools.plan.calibration import (
    EXPERT_LAYER_SECONDS,
    HOST_COPY_EFFICIENCY,
    LINK_EFFICIENCY,
    MATMUL_EFFICIENCY,
    SYNC_SECONDS,
    Software,
)
from nemo_jepo.tools.plan.hardware import GPU
from nemo_jepo.tools.plan.memory import StageParameters, optimizer_bytes, stage_parameters
from nemo_jepo.tools.plan.shape import ModelShape
from nemo_jepo.tools.plan.workload import SHARED_FILL, Workload

Seconds = Mapping[str, float]
"""What takes how many seconds."""
ROUNDING = 64
"""Tokens by which a row is longer than its content: half of the 128 that the actor rounds up to on a GPU."""


@dataclass(frozen=True, slots=True)
class Pass:
    """What is done with a row, in forward passes: backward counts twice, and recompute once with it."""

    forward: int
    backward: int


SCORING, TRAINING, BACKWARD = Pass(1, 0), Pass(1, 1), Pass(0, 1)


@dataclass(frozen=True, slots=True)
class Rows:
    """Micro-batches of a replica in one update, all alike."""

    count: int
    tokens: float
    """Of each, padding included."""
    context: float
    """As in `Computed`, and the next."""
    scored_share: float


@dataclass(frozen=True, slots=True)
class Trainer:
    """A model in its layout on its GPUs."""

    shape: ModelShape
    model: ModelConfig
    gpu: GPU
    world_size: int
    gpus_per_node: int
    software: Software

    @property
    def replicas(self) -> int:
        """Data-parallel replicas."""
        return self.model.data_parallel_size(self.world_size)

    @property
    def _tensor(self) -> int:
        return self.model.tensor_model_parallel_size

    @property
    def _sequence(self) -> int:
        return self._tensor if self.model.sequence_parallel else 1

    @property
    def _bf16_rate(self) -> float:
        return self.gpu.bf16_flops * MATMUL_EFFICIENCY["bf16"]

    def _matmul_rate(self) -> float:
        if not self.model.fp8:
            return self._bf16_rate
        in_bf16 = 0
        if self.model.first_last_layers_bf16:
            in_bf16 = self.model.num_layers_at_start_in_bf16 + self.model.num_layers_at_end_in_bf16
        share = min(1.0, in_bf16 / self.shape.num_layers)
        rate = self.gpu.matmul_peak(fp8=True) * MATMUL_EFFICIENCY["fp8"]
        return 1 / (share / self._bf16_rate + (1 - share) / rate)

    def link(self, ranks: int) -> float:
        """Bytes/s of a collective over so many neighbouring ranks."""
        inside = ranks <= min(self.gpus_per_node, self.world_size)
        return LINK_EFFICIENCY * (self.gpu.nvlink_bandwidth if inside else self.gpu.network_bandwidth)

    def rows(self, work: Workload) -> Rows:
        """What a replica's share of the sequences comes to; an interleaved schedule takes a multiple of its stages."""
        model, longest = self.model, self.model.tokens_per_micro_batch
        shared = self.software.fits_rows and model.share_prompts and model.context_parallel_size == 1
        computed = work.computed(longest if shared else None)
        tokens = computed.tokens / work.num_updates / self.replicas
        fill, stages = SHARED_FILL if shared else work.packing_fill, model.pipeline_model_parallel_size
        count = math.ceil(tokens / (longest * fill))
        if model.virtual_pipeline_model_parallel_size is not None:
            count = math.ceil(count / stages) * stages
        length = float(longest)
        if self.software.fits_rows:  # pipeline stages pad all rows to the longest, which is nearly full
            length = min(length, tokens / count / (fill if stages > 1 and count > 1 else 1) + ROUNDING)
        return Rows(count, length, computed.context, computed.scored_share)

    def row(self, rows: Rows, num_layers: int, has_head: bool, step: Pass) -> Seconds:
        """Seconds of one micro-batch on one rank of a stage."""
        shape, recompute = self.shape, self.model.activations_checkpoint_granularity
        tokens = rows.tokens / self.model.context_parallel_size
        passes = step.forward + step.backward * (3 if recompute == "full" else 2)
        attention_passes = step.forward + step.backward * (3.5 if recompute else 2.5)
        matrices = 2 * num_layers * shape.active_layer_matrices * tokens / self._tensor
        attention = num_layers * shape.attention_flops(rows.context) * tokens / self._tensor
        width = max(1, shape.experts_per_token) * shape.inner_size
        moved = 2 * num_layers * tokens * (14 * shape.hidden_size / self._sequence + 3 * width / self._tensor)
        head = 2 * shape.embedding / self._tensor * tokens * rows.scored_share if has_head else 0
        seconds = {
            "matrix products": passes * matrices / self._matmul_rate(),
            "attention": attention_passes * attention / self._bf16_rate,
            "elementwise": passes * moved / self.gpu.memory_bandwidth,
            "output head": (self.software.head_products if step.backward else 1) * head / self._bf16_rate,
            "experts": EXPERT_LAYER_SECONDS * num_layers * passes / 3 if shape.num_experts else 0.0,
            "pipeline transfers": self._pipeline_transfer(tokens) * (step.forward + step.backward),
        }
        seconds["layer transfers"] = num_layers * self._layer_transfer(tokens, step)
        return seconds

    def _layer_transfer(self, tokens: float, step: Pass) -> float:
        """Seconds of one layer's collectives that no computation hides."""
        if self.software.overlaps_tensor_parallel:
            return 0.0
        model, shape = self.model, self.shape
        ranks, context = self._tensor, model.context_parallel_size
        recompute = 4 if model.activations_checkpoint_granularity == "full" else 0
        count = 4 * step.forward + step.backward * ((6 if model.sequence_parallel else 4) + recompute)
        tensor = count * (ranks - 1) / ranks * tokens * shape.hidden_size * 2 / self.link(ranks)
        ring = (step.forward + 2 * step.backward) * (context - 1) * tokens * 2 * shape.key_value_width / ranks * 2
        experts = model.expert_model_parallel_size
        sent = shape.experts_per_token * tokens / self._sequence * shape.hidden_size * 2 * (experts - 1) / experts
        exchange = 2 * (step.forward + step.backward) * sent / self.link(experts)
        return tensor + ring / self.link(ranks * context) + exchange

    def _pipeline_transfer(self, tokens: float) -> float:
        """Seconds in which a stage hands one micro-batch on, one way, in all its chunks."""
        if self.model.pipeline_model_parallel_size == 1 or self.software.overlaps_tensor_parallel:
            return 0.0
        chunks = self.model.virtual_pipeline_model_parallel_size or 1
        return chunks * tokens / self._sequence * self.shape.hidden_size * 2 / self.link(self.world_size)

    def over_rows(self, work: Workload, step: Pass) -> Seconds:
        """Seconds in which a replica's rows of one update are gone through, pipeline bubble included."""
        stages = stage_layers(self.model, self.shape.num_layers)
        rows = self.rows(work)
        last = len(stages) - 1
        slowest = max(
            (self.row(rows, layers, stage == last, step) for stage, layers in enumerate(stages)),
            key=lambda row: sum(row.values()),
        )
        bubble = (len(stages) - 1) / (self.model.virtual_pipeline_model_parallel_size or 1)
        return {name: rows.count * value for name, value in slowest.items()} | {
            "pipeline bubble": bubble * sum(slowest.values())
        }

    def _fullest_stage(self) -> StageParameters:
        return max(stage_parameters(self.shape, self.model), key=lambda stage: stage.total)

    def update(self, precision: str) -> Seconds:
        """Seconds of the gradient reduction, the optimizer step and the gathering of weights, once."""
        model, stage = self.model, self._fullest_stage()
        per_stage = self.world_size // model.pipeline_model_parallel_size
        copies = [
            (stage.dense, per_stage / self._tensor),
            (stage.experts, per_stage / model.expert_model_parallel_size),
        ]
        weight = 2 if precision == "bf16" else 4
        moved = sum(count * (4 + weight) * (n - 1) / n for count, n in copies)
        shares = sum(count / (n if model.optim.distributed else 1) for count, n in copies)
        transfer = 0.0 if self.software.overlaps_gradients else moved / self.link(per_stage)
        # gradient and weights read, main weights and two moments read and written, weights written
        return {"gradient transfers": transfer, "optimizer": shares * (4 + 3 * 8 + weight) / self.gpu.memory_bandwidth}

    def training(self, work: Workload, precision: str, one_pass: bool = False) -> Seconds:
        """Seconds of all updates of a step; with one_pass without the forward pass, which scoring has kept."""
        seconds = {**self.over_rows(work, BACKWARD if one_pass else TRAINING), **self.update(precision)}
        return {name: work.num_updates * value for name, value in seconds.items()}

    def scoring(self, work: Workload) -> Seconds:
        """Seconds in which every sequence of a step is scored once."""
        seconds = self.over_rows(work, SCORING)
        return {name: work.num_updates * value for name, value in seconds.items()}

    def offload(self, precision: str) -> float:
        """Seconds in which optimizer state goes to host memory and comes back."""
        size = optimizer_bytes(self._fullest_stage(), self.model, self.world_size, precision)
        return 2 * size / (self.gpu.host_bandwidth * HOST_COPY_EFFICIENCY)

    def reference_swap(self, precision: str) -> float:
        """Seconds in which reference weights come and go: two exchanges, each both ways at once."""
        size = self._fullest_stage().total * (2 if precision == "bf16" else 4)
        if self.model.reference_policy == "cpu":
            return 2 * size / (self.gpu.host_bandwidth * HOST_COPY_EFFICIENCY)
        return 2 * 6 * size / self.gpu.memory_bandwidth  # three copies in an exchange, each read and written

    def weight_sync(self, precision: str, to_servers: float) -> Seconds:
        """Seconds of a weight sync: a replica's first rank takes weights in and hands them on at the same time.

            taking in     (t - 1)/t of its stage and (p - 1)/p of the model over their links, joined in three copies
            handing on    the model once, however many servers there are

        Args:
            to_servers: bytes/s at which it reaches the servers; infinite for a sampler in its own process.
        """
        model, size = self.model, (2 if precision == "bf16" else 4) * self.shape.num_parameters
        tensor, stages = self._tensor, model.pipeline_model_parallel_size
        gathered = size / stages * (tensor - 1) / tensor / self.link(tensor)
        from_stages = size * (stages - 1) / stages / self.link(self.world_size)
        joined = 2 * 3 * size / self.gpu.memory_bandwidth
        moving = max(gathered + from_stages + joined, size / to_servers)
        return {"moving weights": moving, "pause and parity check": SYNC_SECONDS}
