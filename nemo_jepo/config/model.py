"""The `model` section: shape, parallel layout, precision, memory and optimizer of the Megatron actor."""

from dataclasses import dataclass, field
from typing import Any

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.rules import Rule, setting

TWO_DECAYS = Rule(
    "two numbers in [0, 1)", lambda betas: len(betas) == 2 and all(0 <= b < 1 for b in betas), "Use [0.9, 0.95]"
)


@dataclass(kw_only=True, slots=True)
class SchedConfig:
    """The learning rate over steps: linear from 0 over warmup_steps, then as the name says until max_steps.

    As in Megatron, the first update of such a warm-up has learning rate 0.
    """

    name: str = setting("constant", choices=("constant", "cosine"))
    """What follows the linear part: constant, or a cosine down to min_lr."""
    warmup_steps: int = setting(0, ge=0)
    """Steps of the linear part."""
    min_lr: float = setting(0.0, ge=0)
    """The learning rate at the end of a cosine."""


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW, as Megatron's optimizer runs it."""

    lr: float = setting(1e-6, ge=0)
    """Largest learning rate."""
    weight_decay: float = setting(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    betas: list[float] = setting(lambda: [0.9, 0.95], TWO_DECAYS)
    """Decay of the first and of the second moment."""
    eps: float = setting(1e-8, gt=0)
    """Added to the root of the second moment."""
    distributed: bool = True
    """Shard the optimizer state over data-parallel ranks (Megatron's distributed optimizer)."""
    sched: SchedConfig = field(default_factory=SchedConfig)


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The Megatron actor: shape, layout, memory."""

    hf_config: dict[str, Any] | None = field(default_factory=dict)
    """A Hugging Face config written inline (model_type: llama, qwen2, qwen3, ...). The weights start at random."""
    hf_config_path: str | None = setting(None, exists=True, fix="Give a config.json or the folder that holds it")
    """The same from a config.json, or from a folder that holds one."""
    seed: int = setting(1234, ge=0)
    """Seed of random weights and of dropout."""
    tensor_model_parallel_size: int = setting(1, ge=1)
    """GPUs that share one layer."""
    pipeline_model_parallel_size: int = setting(1, ge=1)
    """Groups of GPUs that hold consecutive layers."""
    virtual_pipeline_model_parallel_size: int | None = setting(None, ge=1)
    """Interleaved schedule: model chunks of each pipeline stage; null for one."""
    num_layers_in_first_pipeline_stage: int | None = setting(None, ge=1)
    """Uneven pipeline: layers of the first stage, which also holds the embedding; null for an equal share."""
    num_layers_in_last_pipeline_stage: int | None = setting(None, ge=1)
    """Uneven pipeline: layers of the last stage, which also holds the output matrix; null for an equal share."""
    context_parallel_size: int = setting(1, ge=1)
    """GPUs that share one packed row, each a part of every sequence."""
    expert_model_parallel_size: int = setting(1, ge=1)
    """GPUs that share the experts of a mixture-of-experts layer."""
    sequence_parallel: bool = False
    """Shard activations between tensor-parallel regions along the tokens."""
    fp8: str | None = setting(None, choices=("hybrid", "e4m3"))
    """FP8 matrix products through Transformer Engine: hybrid (e4m3 forward, e5m2 backward) or e4m3; null for none."""
    fp8_recipe: str = setting(
        "tensorwise",
        choices=("tensorwise", "blockwise"),
        fix="Choose one of these; delayed is gone, and tensorwise takes its place",
    )
    """Where the scales of FP8 come from: tensorwise (the tensor; fastest on Hopper), or blockwise (blocks of it)."""
    first_last_layers_bf16: bool = False
    """Keep the first and the last layers in BF16."""
    num_layers_at_start_in_bf16: int = setting(1, ge=0)
    """With first_last_layers_bf16: how many of the first layers stay in BF16."""
    num_layers_at_end_in_bf16: int = setting(1, ge=0)
    """With first_last_layers_bf16: how many of the last layers stay in BF16."""
    fp8_guard_interval: int = setting(20, ge=0)
    """With fp8: steps between comparisons of one row's FP8 scores with BF16 ones; 0 for none."""
    fp8_guard_ratio: float = setting(0.1, ge=0)
    """Largest error of an answer's FP8 log-prob, relative to the spread of the answer's log-probs within groups."""
    fp8_guard_action: str = setting("warn", choices=("warn", "bf16"))
    """Above that: warn, or bf16 (score in BF16 for the rest of the run; training stays in FP8)."""
    tokens_per_micro_batch: int = setting(4096, ge=1)
    """T, the most tokens of a packed row, which is as long as its content; no sequence may be longer."""
    share_prompts: bool = True
    """Compute a prompt once for all its samples. Without effect under context parallelism."""
    update_passes: str = setting("auto", choices=("auto", "one", "two"))
    """Forward passes of the policy in an update: one (the scoring pass keeps its graph), two, or auto (one where its
    activations fit). Pipeline stages need two."""
    logprob_chunk_tokens: int = setting(384, ge=1)
    """The output head holds as many fp32 logits at one time as so many tokens have."""
    activations_checkpoint_granularity: str | None = setting(None, choices=("selective", "full"))
    """What the backward pass computes again: selective (attention), full (every layer), or null for nothing."""
    reference_policy: str = setting("cpu", choices=("cpu", "gpu"))
    """Where the frozen initial weights wait between swaps; gpu keeps them resident. Unused with kl.beta=0."""
    optim: OptimConfig = field(default_factory=OptimConfig)

    @property
    def segment_multiple(self) -> int:
        """Tokens: packed segments are padded to a multiple of it, so that context-parallel ranks share each alike."""
        return 1 if self.context_parallel_size == 1 else 2 * self.context_parallel_size

    @property
    def row_shards(self) -> int:
        """Ranks over which a packed row is cut between matrix products: its tokens are a multiple."""
        return self.context_parallel_size * (self.tensor_model_parallel_size if self.sequence_parallel else 1)

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas left once each model copy has its ranks."""
        ranks_per_copy = self.tensor_model_parallel_size * self.pipeline_model_parallel_size
        ranks_per_copy *= self.context_parallel_size
        if world_size % ranks_per_copy:
            raise ConfigError(
                "model.tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size",
                ranks_per_copy,
                f"must divide the {world_size} trainer ranks",
                "Change either size, or trainer.devices and trainer.num_nodes",
            )
        experts_over = world_size // self.pipeline_model_parallel_size
        if experts_over % self.expert_model_parallel_size:
            rule = f"must divide the {experts_over} ranks of a pipeline stage"
            raise ConfigError(
                "model.expert_model_parallel_size", self.expert_model_parallel_size, rule, "Choose a divisor"
            )
        return world_size // ranks_per_copy
