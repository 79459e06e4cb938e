"""Every setting, its default and its rule. No torch here: a bad setting is found before a model is built.

Defaults live in these dataclasses and nowhere else; conf/ holds only differences. Checks of one field sit in
`__post_init__`; rules between nodes, files and machines are in settings.check.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from nemo_jepo.config.errors import ConfigError as ConfigError
from nemo_jepo.config.errors import DataError as DataError
from nemo_jepo.config.errors import at_least as _at_least
from nemo_jepo.config.errors import existing as _existing
from nemo_jepo.config.errors import in_unit_interval as _in_unit_interval
from nemo_jepo.config.errors import one_of as _one_of
from nemo_jepo.config.judge import JudgeConfig, model_verifier_config


@dataclass(kw_only=True, slots=True)
class LoopConfig:
    """How long, how often, how many: the `trainer.jepo` node."""

    max_steps: int = 100
    """Optimizer steps in the whole run; 0 makes the warm-up alone."""
    max_epochs: int | None = None
    """Passes over the training data; the run ends at whichever of this and max_steps comes first."""
    num_prompts_per_step: int = 64
    """P of the global batch, over all data-parallel ranks."""
    num_generations_per_prompt: int = 4
    """G, the n of the paper."""
    val_check_interval: int = 0
    """Steps between validations; 0 validates only at the end."""
    val_at_start: bool = False
    """Also validate before the first step."""
    save_interval: int = 0
    """Steps between checkpoints; 0 saves only at the end and when interrupted."""
    async_save: bool = False
    """Write checkpoints in the background while training goes on; the run's end waits for the last one."""
    keep_checkpoints: int = 2
    """Complete checkpoints kept; older ones are deleted after a newer one is whole."""
    gradient_clip_val: float = 1.0
    """Largest global gradient norm, 0 for no clipping."""
    log_rollouts: int = 4
    """Rollouts written to rollouts/step_*.jsonl every step."""

    def __post_init__(self) -> None:
        for name in ("num_prompts_per_step", "num_generations_per_prompt", "keep_checkpoints"):
            _at_least(f"trainer.jepo.{name}", getattr(self, name), 1)
        for name in ("max_steps", "val_check_interval", "save_interval", "log_rollouts", "gradient_clip_val"):
            _at_least(f"trainer.jepo.{name}", getattr(self, name), 0)
        _at_least("trainer.jepo.max_epochs", self.max_epochs, 1)


@dataclass(kw_only=True, slots=True)
class TrainerConfig:
    """The machines. World size = num_nodes * devices."""

    num_nodes: int = 1
    devices: int = 1
    """Trainer processes on a node: GPUs, or CPU processes over gloo."""
    precision: str = "bf16"
    """bf16 (fp32 main weights and gradients) or fp32 (tests and CPU)."""
    jepo: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        _one_of("trainer.precision", self.precision, ("bf16", "fp32"))
        _at_least("trainer.num_nodes", self.num_nodes, 1)
        _at_least("trainer.devices", self.devices, 1)


@dataclass(kw_only=True, slots=True)
class SchedConfig:
    """Learning rate over steps: linear from 0 over warmup_steps, then constant or cosine to min_lr at max_steps.

    As in Megatron, the first update of a warm-up has learning rate 0.
    """

    name: str = "constant"
    warmup_steps: int = 0
    min_lr: float = 0.0

    def __post_init__(self) -> None:
        _one_of("model.optim.sched.name", self.name, ("constant", "cosine"))
        _at_least("model.optim.sched.warmup_steps", self.warmup_steps, 0)


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW, as Megatron's optimizer runs it."""

    lr: float = 1e-6
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    distributed: bool = True
    """Shard optimizer state over data-parallel ranks (Megatron's distributed optimizer)."""
    sched: SchedConfig = field(default_factory=SchedConfig)

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ConfigError("model.optim.betas", list(self.betas), "needs two numbers in [0, 1)", "Use [0.9, 0.95]")
        _at_least("model.optim.lr", self.lr, 0)


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The Megatron actor: shape, layout, memory."""

    hf_config: dict[str, Any] | None = field(default_factory=dict)
    """A Hugging Face config written inline (model_type: llama | qwen2 | qwen3 | ...): random initialisation."""
    hf_config_path: str | None = None
    """The same from a config.json or a folder that holds one."""
    seed: int = 1234
    tensor_model_parallel_size: int = 1
    """GPUs that share one layer."""
    pipeline_model_parallel_size: int = 1
    """Groups of GPUs that hold consecutive layers."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Interleaved schedule: model chunks of each pipeline stage; null for one."""
    num_layers_in_first_pipeline_stage: int | None = None
    """Uneven pipeline: layers of the first stage, which also holds the embedding; null for an equal share."""
    num_layers_in_last_pipeline_stage: int | None = None
    """Uneven pipeline: layers of the last stage, which also holds the output matrix; null for an equal share."""
    context_parallel_size: int = 1
    """GPUs that share one packed row, each a part of every sequence."""
    expert_model_parallel_size: int = 1
    """GPUs that share the experts of a mixture-of-experts layer."""
    sequence_parallel: bool = False
    """Shard activations between tensor-parallel regions along the tokens."""
    fp8: str | None = None
    """null, hybrid (e4m3 forward, e5m2 backward) or e4m3: FP8 matrix products through Transformer Engine."""
    fp8_recipe: str = "blockwise"
    """How FP8 scales are chosen: delayed, tensorwise or blockwise."""
    fp8_param: bool = False
    """Keep the weights themselves in FP8 (main weights stay fp32)."""
    first_last_layers_bf16: bool = False
    """Keep the first and the last layer in BF16 (not with fp8_recipe=delayed)."""
    num_layers_at_start_in_bf16: int = 1
    num_layers_at_end_in_bf16: int = 1
    fp8_guard_interval: int = 20
    """With fp8: steps between comparisons of one row's FP8 scores with BF16 ones; 0 for none."""
    fp8_guard_ratio: float = 0.1
    """Largest error of an answer's FP8 log-prob, as a share of its spread within groups."""
    fp8_guard_action: str = "warn"
    """Above that: warn, or bf16 (score in BF16 for the rest of the run; training stays in FP8)."""
    tokens_per_micro_batch: int = 4096
    """T of a packed row; no sequence may be longer."""
    logprob_chunk_tokens: int = 384
    """Tokens whose fp32 logits exist at one time in the output head."""
    activations_checkpoint_granularity: str | None = None
    """null, selective (attention) or full (every layer): recompute activations in the backward pass."""
    reference_policy: str = "cpu"
    """Where the frozen initial weights wait between swaps: cpu, or gpu (resident). Unused when kl.beta = 0."""
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        _one_of("model.reference_policy", self.reference_policy, ("cpu", "gpu"))
        _one_of(
            "model.activations_checkpoint_granularity",
            self.activations_checkpoint_granularity,
            (None, "selective", "full"),
        )
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "num_layers_in_first_pipeline_stage",
            "num_layers_in_last_pipeline_stage",
            "context_parallel_size",
            "expert_model_parallel_size",
            "logprob_chunk_tokens",
        ):
            _at_least(f"model.{name}", getattr(self, name), 1)
        _one_of("model.fp8", self.fp8, (None, "hybrid", "e4m3"))
        _one_of("model.fp8_recipe", self.fp8_recipe, ("delayed", "tensorwise", "blockwise"))
        _at_least("model.fp8_guard_interval", self.fp8_guard_interval, 0)
        _at_least("model.fp8_guard_ratio", self.fp8_guard_ratio, 0)
        _one_of("model.fp8_guard_action", self.fp8_guard_action, ("warn", "bf16"))
        _existing("model.hf_config_path", self.hf_config_path, "Give a config.json or the folder that holds it")

    @property
    def segment_multiple(self) -> int:
        """Tokens: packed segments are padded to a multiple of it, so that context-parallel ranks share each alike."""
        return 1 if self.context_parallel_size == 1 else 2 * self.context_parallel_size

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


@dataclass(kw_only=True, slots=True)
class ArithmeticConfig:
    """Generated chains such as 7+5*3-2, evaluated left to right mod 10: the demo's data."""

    num_steps: int = 4
    """Operations in a chain."""
    num_train: int = 20000
    num_validation: int = 256
    right_share: float = 0.4
    """Share of the warm-up corpus whose chain of thought is right."""
    corrupted_share: float = 0.4
    """Share whose chain of thought has a wrong intermediate result; the answer stays the true one."""
    answers: str = "short"
    """How reference answers are written: short (a digit), mixed (some problems in words, answered by a phrase that no
    verifier reads) or derivation (sentences that no verifier reads)."""
    in_words_share: float = 0.4
    """With answers=mixed: share of the problems that are in words."""

    def __post_init__(self) -> None:
        _at_least("data.arithmetic.num_steps", self.num_steps, 1)
        _one_of("data.arithmetic.answers", self.answers, ("short", "mixed", "derivation"))
        _in_unit_interval("data.arithmetic.in_words_share", self.in_words_share)
        if not 0 <= self.right_share + self.corrupted_share <= 1:
            raise ConfigError(
                "data.arithmetic.right_share + corrupted_share",
                self.right_share + self.corrupted_share,
                "must lie in [0, 1]; the rest has no chain of thought",
                "Lower one of them",
            )


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where prompts and reference answers come from (config group `data=`)."""

    name: str = "jsonl"
    """jsonl (JSONL or Parquet by key names), gsm8k or arithmetic."""
    train_path: str | None = None
    validation_path: str | None = None
    prompt_key: str = "question"
    answer_key: str = "answer"
    chain_of_thought_key: str | None = None
    """Field with a golden chain of thought, for objective=sft with objective.sft_target=chain_of_thought."""
    prompt_template: str = "{question}\n"
    """The plain prompt; {question} is replaced. Or the user turn, with use_chat_template."""
    use_chat_template: bool = False
    """Wrap the prompt by the tokeniser's own chat template, with the generation prompt added."""
    system_prompt: str | None = None
    """System turn of the chat template."""
    on_bad_row: str = "error"
    """error (names file, line and field) or skip (counts and lists them)."""
    max_prompt_tokens: int = 1024
    max_answer_tokens: int = 1024
    """Longest reference answer, end-of-turn included. A longer row is a bad row."""
    shuffle: bool = True
    seed: int = 1234
    num_validation_prompts: int = 128
    """Validation uses the first so many rows."""
    arithmetic: ArithmeticConfig = field(default_factory=ArithmeticConfig)

    def __post_init__(self) -> None:
        _one_of("data.name", self.name, ("jsonl", "gsm8k", "arithmetic"))
        _one_of("data.on_bad_row", self.on_bad_row, ("error", "skip"))
        for name in ("max_prompt_tokens", "max_answer_tokens", "num_validation_prompts"):
            _at_least(f"data.{name}", getattr(self, name), 1)
        if "{question}" not in self.prompt_template:
            raise ConfigError("data.prompt_template", self.prompt_template, "has no {question}", "Add it")
        if self.system_prompt is not None and not self.use_chat_template:
            raise ConfigError(
                "data.system_prompt",
                self.system_prompt,
                "is a turn of the chat template",
                "Add data.use_chat_template=true",
            )
        for key in ("train_path", "validation_path"):
            _existing(f"data.{key}", getattr(self, key), "Give the path of a .jsonl or .parquet file")

    def check(self) -> None:
        """A data set that is read from disk needs its file."""
        if self.name != "arithmetic" and self.train_path is None:
            raise ConfigError("data.train_path", None, f"data={self.name} reads a file", "Add data.train_path=FILE")


@dataclass(kw_only=True, slots=True)
class TokenizerConfig:
    """The tokeniser: a folder, or one trained on the training data (small models from scratch)."""

    path: str | None = None
    """A Hugging Face tokeniser folder; default: pretrained_checkpoint.restore_from_path."""
    train_vocab_size: int = 512
    """Without a path: train a byte-level BPE of this size on the training file, into the run folder."""

    def __post_init__(self) -> None:
        _existing("tokenizer.path", self.path, "Give a folder with tokenizer.json")
        _at_least("tokenizer.train_vocab_size", self.train_vocab_size, 260)


@dataclass(kw_only=True, slots=True)
class AnswerConfig:
    """How a generation's chain of thought ends and how the reference answer joins it."""

    marker: str = "the final answer is"
    """Searched case-insensitively in the decoded generation; the chain of thought ends right after it."""
    append_eos: bool = True
    """The reference answer ends with the end-of-turn id."""
    min_cot_tokens: int = 0
    """A shorter chain of thought (marker not counted) is not valid."""

    def __post_init__(self) -> None:
        if not self.marker or self.marker != self.marker.strip():
            raise ConfigError("answer.marker", self.marker, "must begin and end with a visible character", "Trim it")
        _at_least("answer.min_cot_tokens", self.min_cot_tokens, 0)


@dataclass(kw_only=True, slots=True)
class VLLMConfig:
    """The vLLM servers and how a run talks to them; read by rollout=vllm alone."""

    num_servers: int = 1
    """Servers that rollout.servers=auto starts on this node."""
    tensor_parallel_size: int = 1
    """GPUs of one server that rollout.servers=auto starts."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Further options of vLLM's server for rollout.servers=auto, {gpu_memory_utilization: 0.9, ...}."""
    api_key_file: str | None = None
    """File with the servers' key; default: the environment's NEMO_JEPO_API_KEY, or with auto a fresh random key."""
    start_timeout_s: float = 900.0
    """Seconds until the first server must answer."""
    request_timeout_s: float = 1800.0
    """Seconds one attempt at one completion may take."""
    max_attempts: int = 4
    """Attempts at one completion, each on another server where there is one; after that the sample has failed."""
    max_concurrency: int = 256
    """Completions that one data-parallel replica keeps in flight at one server."""
    weight_transfer: str = "auto"
    """auto (nccl with GPUs, gloo without), nccl, gloo, or file (safetensors in the run folder, which servers share)."""
    sync_timeout_s: float = 600.0
    """Seconds until a weight sync must be over."""
    parity_tolerance: float | None = None
    """Largest mean |log-prob of the server - log-prob of the trainer| after a sync, nats; default 1e-4 in fp32, 0.1 in
    bf16."""

    def __post_init__(self) -> None:
        for name in ("num_servers", "tensor_parallel_size", "max_attempts", "max_concurrency"):
            _at_least(f"rollout.vllm.{name}", getattr(self, name), 1)
        for name in ("start_timeout_s", "request_timeout_s", "sync_timeout_s", "parity_tolerance"):
            _at_least(f"rollout.vllm.{name}", getattr(self, name), 0)
        _one_of("rollout.vllm.weight_transfer", self.weight_transfer, ("auto", "nccl", "gloo", "file"))
        _existing("rollout.vllm.api_key_file", self.api_key_file, "Write the key into a file that only you can read")


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    """How completions are sampled (config group `rollout=`)."""

    name: str = "embedded"
    """embedded: transformers in process, one copy per data-parallel replica; vllm: a pool of vLLM servers."""
    temperature: float = 1.0
    top_p: float = 1.0
    """Sample from the smallest set of tokens that holds this much probability; 1 samples the policy itself."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0 for all of them."""
    allow_truncated_sampling: bool = False
    """Permit top_p and top_k with a likelihood objective, whose samples are then not the policy's own."""
    max_tokens: int = 1024
    """Longest generation, own answer included where it is decoded."""
    stop_at_marker: bool = True
    """Stop right after the marker: the own answer is never needed by a likelihood objective."""
    batch_size: int = 256
    """Sequences decoded together by the embedded sampler."""
    servers: Any = "auto"
    """auto: the run starts and stops vLLM servers on its own node; or a list of URLs of `nemo-jepo serve`."""
    max_staleness: int = 0
    """k: sampling runs up to k optimizer steps ahead of training; 0 is on-policy."""
    vllm: VLLMConfig = field(default_factory=VLLMConfig)

    def __post_init__(self) -> None:
        _one_of("rollout.name", self.name, ("embedded", "vllm"))
        for name in ("max_tokens", "batch_size"):
            _at_least(f"rollout.{name}", getattr(self, name), 1)
        for name in ("top_k", "max_staleness"):
            _at_least(f"rollout.{name}", getattr(self, name), 0)
        if self.temperature <= 0:
            raise ConfigError("rollout.temperature", self.temperature, "must be positive", "Use 1.0, as the paper does")
        if not 0 < self.top_p <= 1:
            raise ConfigError("rollout.top_p", self.top_p, "must lie in (0, 1]", "Use 1.0, as the paper does")
        self.server_urls()

    def server_urls(self) -> tuple[str, ...] | None:
        """The servers' addresses; None for auto."""
        if self.servers == "auto":
            return None
        urls = [self.servers] if isinstance(self.servers, str) else self.servers
        if not isinstance(urls, list) or not urls or not all(str(url).startswith("http://") for url in urls):
            rule = "must be auto or a list of addresses http://HOST:PORT"
            raise ConfigError("rollout.servers", self.servers, rule, "Give what `nemo-jepo serve` prints")
        return tuple(str(url).rstrip("/") for url in urls)


OBJECTIVES = ("jepo", "jepo_single", "rloo", "jepo_rl", "vr_cli", "prob_pg", "sft")
VERIFIED_OBJECTIVES = ("rloo", "jepo_rl")
"""Objectives that read a verifiable reward of the sample's own answer, which must therefore be decoded."""

SFT_TARGETS = ("answer", "marked_answer", "chain_of_thought")


@dataclass(kw_only=True, slots=True)
class ObjectiveConfig:
    """What is maximised (config group `objective=`; docs/objective.md)."""

    name: str = "jepo"
    beta_sup: float = 1.0
    """Weight of the supervised term, the gradient of the bound through the answer's log-prob."""
    rl_reduction: str = "mean"
    """mean: 1/n over a prompt's samples, as App. B.2 and Eq. 5; sum: Eq. 7 to the letter."""
    length_normalization: str = "none"
    """none, or tokens: each sample's log-probs divided by their number (for sft: mean over target tokens)."""
    format_penalty: float = 10.0
    """p: a generation without the marker earns the format reward -p, others 0; 0 switches the format loss off."""
    importance_sampling: str = "none"
    """none, token_truncated or sequence_truncated: corrects the policy-gradient term for a lagging sampler."""
    importance_cap: float = 2.0
    """Largest importance ratio."""
    sft_target: str = "answer"
    """For sft: answer (-log pi(a*|x)), marked_answer (marker and answer, so that own answers can be found and scored as
    those of other objectives) or chain_of_thought (golden chain of thought, marker and answer)."""

    def __post_init__(self) -> None:
        _one_of("objective.name", self.name, OBJECTIVES)
        _one_of("objective.rl_reduction", self.rl_reduction, ("mean", "sum"))
        _one_of("objective.length_normalization", self.length_normalization, ("none", "tokens"))
        _one_of(
            "objective.importance_sampling",
            self.importance_sampling,
            ("none", "token_truncated", "sequence_truncated"),
        )
        _one_of("objective.sft_target", self.sft_target, SFT_TARGETS)
        for name in ("beta_sup", "format_penalty", "importance_cap"):
            _at_least(f"objective.{name}", getattr(self, name), 0)


@dataclass(kw_only=True, slots=True)
class AdvantageConfig:
    """Post-processing of raw advantages (App. B.2): clip(A / std(A), -clip, clip), no mean subtraction."""

    normalize: bool = True
    """False: the raw advantage, neither scaled nor clipped."""
    clip: float = 1.0
    std_scope: str = "batch"
    """batch: std over every valid sample of the global batch; group: of the prompt's own samples."""

    def __post_init__(self) -> None:
        _one_of("advantage.std_scope", self.std_scope, ("batch", "group"))
        if self.clip <= 0:
            raise ConfigError("advantage.clip", self.clip, "must be positive", "Use 1.0, or advantage.normalize=false")


@dataclass(kw_only=True, slots=True)
class KLConfig:
    """The pull towards the frozen initial policy, over the chain of thought."""

    beta: float = 1e-3
    """0 skips the reference policy altogether."""
    estimator: str = "k2_token"
    """k2_token, k2_sequence, k3_token (losses) or k1_reward; docs/objective.md says which gradient each has."""

    def __post_init__(self) -> None:
        _one_of("kl.estimator", self.estimator, ("k2_token", "k2_sequence", "k3_token", "k1_reward"))
        _at_least("kl.beta", self.beta, 0)


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """Held-out figures: accuracy and proxy NLL from the same samples."""

    num_generations_per_prompt: int = 4
    """n of the proxy NLL, -(logsumexp_i l_i - log n); the paper's is 4."""
    temperature: float = 1.0
    """Of the validation samples; the proxy NLL is defined at 1."""
    max_tokens: int | None = None
    """Longest generation, own answer included; default rollout.max_tokens."""
    verify: bool = True
    """Decode and grade own answers (accuracy). False for proofs: proxy NLL alone, generation stops at the marker."""
    verify_timeout_s: float = 5.0
    """Seconds a verifier may take for one answer."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """An LLM's votes on answers that the rule calls wrong (combined_accuracy); off without judge.url."""
    model_verifier: JudgeConfig = field(default_factory=model_verifier_config)
    """The same by one vote of a model trained to compare answers (model_verified_accuracy)."""

    def __post_init__(self) -> None:
        _at_least("evaluation.num_generations_per_prompt", self.num_generations_per_prompt, 1)
        _at_least("evaluation.max_tokens", self.max_tokens, 1)
        if self.temperature <= 0:
            raise ConfigError("evaluation.temperature", self.temperature, "must be positive", "Use 1.0")
        self.judge.check("evaluation.judge")
        self.model_verifier.check("evaluation.model_verifier")


@dataclass(kw_only=True, slots=True)
class WarmupConfig:
    """A supervised run before the main one, in <run>/warmup, whose final weights the main run starts from."""

    max_steps: int = 0
    """0: no warm-up."""
    num_prompts_per_step: int = 64
    lr: float = 1e-4
    sched: SchedConfig = field(default_factory=SchedConfig)
    sft_target: str = "chain_of_thought"
    """As objective.sft_target."""

    def __post_init__(self) -> None:
        _at_least("warmup.max_steps", self.max_steps, 0)
        _at_least("warmup.num_prompts_per_step", self.num_prompts_per_step, 1)
        _one_of("warmup.sft_target", self.sft_target, SFT_TARGETS)


@dataclass(kw_only=True, slots=True)
class PretrainedConfig:
    """Where the initial weights come from."""

    restore_from_path: str | None = None
    """A Hugging Face folder, or a checkpoint of this program (checkpoints/step_*); null: random initialisation."""

    def __post_init__(self) -> None:
        _existing("pretrained_checkpoint.restore_from_path", self.restore_from_path, "Give a model folder")


@dataclass(kw_only=True, slots=True)
class ExpManagerConfig:
    """The keys of NeMo's exp_manager that a run uses; the run folder is <exp_dir>/<name>."""

    exp_dir: str = "results"
    name: str = MISSING
    resume_if_exists: bool = True
    """False: a run folder that holds a checkpoint is an error."""
    create_tensorboard_logger: bool = True
    create_wandb_logger: bool = False
    wandb_logger_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class Config:
    """One run. `nemo-jepo train --config-name NAME --cfg job` prints it resolved."""

    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    pretrained_checkpoint: PretrainedConfig = field(default_factory=PretrainedConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    answer: AnswerConfig = field(default_factory=AnswerConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    exp_manager: ExpManagerConfig = field(default_factory=ExpManagerConfig)
