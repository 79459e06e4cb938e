"""Every setting: its default, its rules and one sentence. No torch: a wrong setting is found before a model is built.

Defaults live in these dataclasses and nowhere else; conf/ holds only differences. Further sections stand in
`config.model`, `config.data` (what is read), `config.update` (what is maximised), `config.hybrid`, `config.judge` and
`config.stages`; rules between settings, files and machines in `config.check`. docs/reference/configuration.md is
generated (`python -m nemo_jepo.config.reference`).
"""

from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from omegaconf import MISSING

from nemo_jepo.config.data import IS_MODEL, AnswerConfig, ArithmeticConfig, DataConfig, TokenizerConfig
from nemo_jepo.config.hybrid import HybridConfig
from nemo_jepo.config.judge import JudgeConfig, model_verifier_config
from nemo_jepo.config.model import ModelConfig, OptimConfig, SchedConfig
from nemo_jepo.config.rules import LONGEST_NAME, LONGEST_PATH, Rule, path_that_fits, setting
from nemo_jepo.config.samplers import SAMPLERS, SamplerKind
from nemo_jepo.config.stages import StageConfig, UntilConfig
from nemo_jepo.config.update import (
    SFT_TARGETS,
    AdvantageConfig,
    DPOConfig,
    KLConfig,
    ObjectiveConfig,
    RefillConfig,
    SelfVerificationConfig,
)

__all__ = [  # every section, wherever it stands
    "AdvantageConfig",
    "AnswerConfig",
    "ArithmeticConfig",
    "CheckpointConfig",
    "Config",
    "DPOConfig",
    "DataConfig",
    "EvaluationConfig",
    "ExpManagerConfig",
    "HybridConfig",
    "JudgeConfig",
    "KLConfig",
    "LoopConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "PretrainedConfig",
    "RolloutConfig",
    "SchedConfig",
    "SelfVerificationConfig",
    "StageConfig",
    "TokenizerConfig",
    "TrainerConfig",
    "UntilConfig",
    "VLLMConfig",
    "WarmupConfig",
]


@dataclass(kw_only=True, slots=True)
class LoopConfig:
    """How long, how often, how many."""

    max_steps: int = setting(100, ge=0)
    """Optimizer steps in the whole run; 0 makes the warm-up and the stages alone."""
    max_epochs: int | None = setting(None, ge=1)
    """Passes over the training data; the run ends at whichever of this and max_steps comes first. Null: no limit."""
    until: UntilConfig = field(default_factory=UntilConfig)
    num_prompts_per_step: int = setting(64, ge=1)
    """P, the prompts of one global batch, over all data-parallel ranks."""
    num_generations_per_prompt: int = setting(4, ge=1)
    """G, the rollouts of one prompt: n of the paper."""
    val_check_interval: int = setting(0, ge=0)
    """Steps between validations; 0 validates only at the end."""
    val_at_start: bool = False
    """Also validate before the first step."""
    save_interval: int = setting(0, ge=0)
    """Steps between checkpoints; 0 saves only at the end and when interrupted."""
    async_save: bool = False
    """Write checkpoints in the background while training goes on; the run's end waits for the last one."""
    keep_checkpoints: int = setting(2, ge=1)
    """Complete checkpoints that are kept; older ones are deleted after a newer one is whole."""
    gradient_clip_val: float = setting(1.0, ge=0)
    """Largest global gradient norm; 0 for no clipping."""
    log_rollouts: int = setting(4, ge=0)
    """Rollouts written to rollouts/step_*.jsonl every step."""


@dataclass(kw_only=True, slots=True)
class TrainerConfig:
    """The machines. World size = num_nodes * devices."""

    num_nodes: int = setting(1, ge=1)
    """Nodes that train."""
    devices: int = setting(1, ge=1)
    """Trainer processes on a node: GPUs, or CPU processes over gloo."""
    precision: str = setting("bf16", choices=("bf16", "fp32"))
    """bf16 (with fp32 main weights and gradients), or fp32 (tests and CPU; never Transformer Engine's layers)."""
    stuck_timeout_s: float | None = setting(180.0, gt=0, fix="Raise it, or null to watch nobody")
    """Of several ranks, one without a sign of life for so long is named, with host, phase and Python stack, and the job
    ends; so it is with one that the others wait for, so long beyond twice the phase's longest time. Null: no watch."""
    jepo: LoopConfig = field(default_factory=LoopConfig)


@dataclass(kw_only=True, slots=True)
class VLLMConfig:
    """The vLLM servers and how a run talks to them; read by rollout=vllm and rollout=vllm_colocated alone."""

    num_servers: int = setting(1, ge=1)
    """Servers that rollout.servers=auto starts on this node."""
    tensor_parallel_size: int = setting(1, ge=1)
    """GPUs of one server that rollout.servers=auto starts."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Further options of vLLM's server for rollout.servers=auto, {gpu_memory_utilization: 0.9, ...}."""
    api_key_file: str | None = setting(None, exists=True, fix="Write the key into a file that only you can read")
    """File with the servers' key; null: the environment's NEMO_JEPO_API_KEY, or with auto a fresh random key."""
    start_timeout_s: float = setting(900.0, ge=0)
    """Seconds until the first server must answer."""
    request_timeout_s: float = setting(1800.0, ge=0)
    """Seconds that one attempt at one completion may take."""
    max_attempts: int = setting(4, ge=1)
    """Attempts at one completion, each on another server where there is one; after that the sample has failed."""
    max_concurrency: int = setting(256, ge=1)
    """Completions that one data-parallel replica keeps in flight at one server."""
    weight_transfer: str = setting("auto", choices=("auto", "nccl", "gloo", "shared_memory", "file"))
    """auto (nccl with GPUs, gloo without, shared_memory with vllm_colocated), nccl, gloo, shared_memory (servers on the
    trainer's node), or file (safetensors in the run folder, which servers share)."""
    sleep_level: int = setting(2, ge=1, le=2)
    """vLLM's, of vllm_colocated. 2: sleeping servers drop their weights; 1: they keep them in host memory, for models
    of which level 2 loses more than the push brings back (the parity check says so)."""
    sync_timeout_s: float = setting(600.0, ge=0)
    """Seconds until a weight sync must be over."""
    parity_tolerance: float | None = setting(None, ge=0)
    """Largest mean |log-prob of the server - log-prob of the trainer| after a sync, nats; null: 1e-4 in fp32, 0.1 in
    bf16."""


def _addresses(servers: Any) -> tuple[str, ...] | None:
    """One address or a list of them; None for anything else."""
    urls = [servers] if isinstance(servers, str) else servers
    if not isinstance(urls, list) or not urls or not all(str(url).startswith("http://") for url in urls):
        return None
    return tuple(str(url).rstrip("/") for url in urls)


SERVERS = Rule(
    "auto or a list of addresses http://HOST:PORT",
    lambda servers: servers == "auto" or _addresses(servers) is not None,
    "Give what `nemo-jepo serve` prints",
)


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    """How completions are sampled (config group `rollout=`)."""

    name: str = setting("embedded", choices=tuple(SAMPLERS))
    """embedded: transformers in the trainer's process, one copy per data-parallel replica. vllm: vLLM servers.
    vllm_colocated: vLLM servers on the trainer's own GPUs, which sleep while it trains."""
    temperature: float = setting(1.0, gt=0, fix="Use 1.0, as the paper does")
    """Sampling temperature."""
    top_p: float = setting(1.0, gt=0, le=1, fix="Use 1.0, as the paper does")
    """Sample from the smallest set of tokens that holds this much probability; 1 samples the policy itself."""
    top_k: int = setting(0, ge=0)
    """Sample from the k likeliest tokens; 0 for all of them."""
    allow_truncated_sampling: bool = False
    """Permit top_p and top_k with a likelihood objective, whose samples are then not the policy's own."""
    max_tokens: int = setting(1024, ge=1)
    """Longest generation, own answer included where it is decoded."""
    stop_at_marker: bool = True
    """Stop right after the marker: a likelihood objective never needs the own answer."""
    batch_size: int = setting(256, ge=1)
    """Sequences that the embedded sampler decodes together."""
    servers: Any = setting("auto", SERVERS)
    """auto: the run starts and stops vLLM servers on its own node; or a list of URLs of `nemo-jepo serve`."""
    max_staleness: int = setting(0, ge=0)
    """k: sampling runs up to k optimizer steps ahead of training; 0 is on-policy."""
    sync_interval: int | None = setting(1, ge=1)
    """s: optimizer steps from one weight sync of training to the next. 1: online; more: semi-online; null: offline, all
    samples are the initial policy's."""
    vllm: VLLMConfig = field(default_factory=VLLMConfig)

    @property
    def kind(self) -> SamplerKind:
        """What the table of samplers says of this one."""
        return SAMPLERS[self.name]

    def server_urls(self) -> tuple[str, ...] | None:
        """The servers' addresses; None for auto."""
        return None if self.servers == "auto" else _addresses(self.servers)


NEW_FILE = Rule(
    "a file, there or not, in a folder that exists",
    lambda path: Path(path).parent.is_dir() and not Path(path).is_dir(),
    "Make the folder, or give another path",
)


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """Held-out metrics: accuracy and proxy NLL from the same samples."""

    num_generations_per_prompt: int = setting(4, ge=1)
    """n of the proxy NLL, -(logsumexp_i l_i - log n), and k of pass_at_k; the paper's n is 4."""
    temperature: float = setting(1.0, gt=0, fix="Use 1.0")
    """Temperature of the validation samples; the proxy NLL is defined at 1."""
    greedy: bool = True
    """Where own answers are decoded, also grade the likeliest completion of each prompt (accuracy_greedy)."""
    max_tokens: int | None = setting(None, ge=1)
    """Longest generation, own answer included; null: rollout.max_tokens."""
    verify: bool = True
    """Decode and grade own answers (accuracy). False for proofs: proxy NLL alone, generation stops at the marker."""
    verify_timeout_s: float = setting(5.0, gt=0)
    """Seconds of CPU time that a verifier may take for one answer."""
    pass_rates: str | None = setting(None, NEW_FILE)
    """File that `nemo-jepo evaluate` writes a line of for every question, with its pass rate: what `data prepare
    --difficulty` reads. Null: none."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """A language model's votes on answers that the verifier calls wrong (combined_accuracy); off without judge.url."""
    model_verifier: JudgeConfig = field(default_factory=model_verifier_config)
    """The same by one vote of a model that is trained to compare answers (model_verified_accuracy)."""


@dataclass(kw_only=True, slots=True)
class WarmupConfig:
    """A supervised run before the main one, in <run>/warmup, whose final weights the main run starts from."""

    max_steps: int = setting(0, ge=0)
    """Optimizer steps of the warm-up; 0 for none."""
    num_prompts_per_step: int = setting(64, ge=1)
    """Prompts of one global batch."""
    lr: float = setting(1e-4, ge=0)
    """Largest learning rate, in the place of model.optim.lr."""
    sched: SchedConfig = field(default_factory=SchedConfig)
    """In the place of model.optim.sched."""
    sft_target: str = setting("chain_of_thought", choices=(*SFT_TARGETS, "sampled_chain"))
    """As objective.sft_target; or sampled_chain: the answer behind chains that the model samples, which are no target
    themselves (objective=sft_sampled_chain)."""
    save_interval: int = setting(0, ge=0)
    """Steps between checkpoints; 0 writes none before the last, except when the run is interrupted."""


@dataclass(kw_only=True, slots=True)
class PretrainedConfig:
    """Where the initial weights come from."""

    restore_from_path: str | None = setting(None, IS_MODEL)
    """A Hugging Face folder, a checkpoint of this program (checkpoints/step_*), or a name of the Hugging Face hub:
    owner/name, or owner/name@revision. Null: random weights."""


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return name.isprintable() and bool(path.parts) and not path.is_absolute() and ".." not in path.parts


INSIDE = Rule(
    "the name of a folder inside exp_manager.exp_dir, without .. and control characters",
    _stays_inside,
    "Use letters, digits, - and _, and / for a folder in a folder",
)
FITS = Rule(
    f"a path that a file system takes, at most {LONGEST_NAME} bytes a name and {LONGEST_PATH} in all",
    path_that_fits,
    "Use a shorter one",
)


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """How checkpoints and other weights are read."""

    verify_on_load: str = setting("own", choices=("own", "all", "none"))
    """Which files a rank compares with the SHA-256 they were written with, while it reads them. own: those it reads;
    all: every file of the folder, divided over the ranks, too; none: no file, and damage is trained on."""


@dataclass(kw_only=True, slots=True)
class ExpManagerConfig:
    """The keys of NeMo's exp_manager that a run uses; the run folder is <exp_dir>/<name>."""

    exp_dir: str = setting("results", FITS)
    """Folder of the runs."""
    name: str = setting(MISSING, INSIDE, FITS)
    """Name of the run; every conf file sets one."""
    resume_if_exists: bool = True
    """Go on from the newest checkpoint. False: a run folder that holds a checkpoint is an error; evaluate leaves it."""
    create_tensorboard_logger: bool = True
    """Write events.out.tfevents.* for TensorBoard."""
    create_wandb_logger: bool = False
    """Log to Weights & Biases."""
    wandb_logger_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the W&B logger: {project: ..., name: ...}."""
    create_mlflow_logger: bool = False
    """Log to MLflow, which must be installed (pip install mlflow-skinny)."""
    mlflow_logger_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the MLflow logger: {experiment_name: ..., tracking_uri: ...}."""


@dataclass(kw_only=True, slots=True)
class Config:
    """One run. `nemo-jepo train --config-name NAME --cfg job` prints it resolved."""

    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    pretrained_checkpoint: PretrainedConfig = field(default_factory=PretrainedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    answer: AnswerConfig = field(default_factory=AnswerConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    hybrid: HybridConfig = field(default_factory=HybridConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    self_verification: SelfVerificationConfig = field(default_factory=SelfVerificationConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    refill: RefillConfig = field(default_factory=RefillConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    stages: list[StageConfig] = field(default_factory=list)
    exp_manager: ExpManagerConfig = field(default_factory=ExpManagerConfig)

    @property
    def keeps_reference_policy(self) -> bool:
        """Whether older weights stay as pi_ref: for the KL, or because the objective reads scores of theirs."""
        objective = self.objective
        reads_initial = objective.no_chain == "initial" or objective.kind.scored_by_initial
        compares = objective.kind.compares_pairs and not (self.dpo.sync_reference and self.rollout.sync_interval == 1)
        return not objective.kind.supervised and (self.kl.beta > 0 or reads_initial or compares)

    @property
    def keeps_sampler_policy(self) -> bool:
        """Whether the weights that the sampler has stay with the trainer: it trains on while they are older."""
        return not self.objective.kind.supervised and self.rollout.sync_interval != 1

    @property
    def reference_is_samplers(self) -> bool:
        """Whether pi_ref is at all times what the sampler has."""
        return self.objective.kind.compares_pairs and self.dpo.sync_reference and self.keeps_sampler_policy

    @property
    def run_folder(self) -> Path:
        """<exp_dir>/<name>: settings, metrics, rollouts and checkpoints of the run."""
        return Path(self.exp_manager.exp_dir) / self.exp_manager.name
