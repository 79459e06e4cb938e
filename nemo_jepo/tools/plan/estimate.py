"""One run on one cluster: does it fit, how long does a step take, what does it cost."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from nemo_jepo.config.check import check
from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import Config
from nemo_jepo.config.shapes import model_shape
from nemo_jepo.tools.plan.calibration import (
    DECODE_STEP_SECONDS,
    EMBEDDED_STEP_SECONDS,
    HOST_COPY_EFFICIENCY,
    LINK_EFFICIENCY,
    OTHER_SECONDS,
    OURS,
    TURN_SECONDS,
    Software,
)
from nemo_jepo.tools.plan.generation import Sampler
from nemo_jepo.tools.plan.hardware import GPU
from nemo_jepo.tools.plan.memory import (
    DEFAULT_UTILIZATION,
    Phase,
    TrainerMemory,
    keeps_graph,
    sampler_memory,
    trainer_phases,
)
from nemo_jepo.tools.plan.shape import ModelShape, shape_of
from nemo_jepo.tools.plan.training import Rows, Trainer
from nemo_jepo.tools.plan.workload import MeanLengths, Workload, workload_of

MOST_SEQUENCES = 1024
"""vLLM's max_num_seqs on GPUs of 70 GiB and more, where rollout.vllm.engine_args does not set it."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """The machines of a run: trainer nodes, and rollout nodes or servers beside the trainer or on its GPUs."""

    gpu: GPU
    gpus_per_node: int
    trainer_nodes: int
    devices: int
    """Trainer GPUs of a node."""
    rollout_nodes: int
    num_servers: int

    @property
    def world_size(self) -> int:
        """Trainer ranks."""
        return self.trainer_nodes * self.devices


@dataclass(frozen=True)
class Plan:
    """What the model says of a run."""

    config: Config
    cluster: Cluster
    shape: ModelShape
    work: Workload
    num_gpus: int
    """Trainer and rollout GPUs."""
    rollout_gpus: int
    replicas: int
    rows: Rows
    """Micro-batches of a replica in a step."""
    one_pass: bool
    """Scoring keeps its graph, and training makes no forward pass of its own."""
    decoded_together: float
    """Sequences in a server's batch at the most."""
    trainer_memory: list[Phase]
    sampler_memory: Phase | None
    seconds: Mapping[str, Mapping[str, float]]
    """Phase -> what takes how long."""

    @property
    def phase_seconds(self) -> dict[str, float]:
        """Phase -> seconds."""
        return {name: sum(parts.values()) for name, parts in self.seconds.items()}

    @property
    def step_seconds(self) -> float:
        """Seconds of a step; with rollout.max_staleness sampling and training go on side by side."""
        phases = self.phase_seconds
        if not self.config.rollout.max_staleness:
            return sum(phases.values())
        training = sum(phases[name] for name in ("log-probs", "reference log-probs", "training"))
        return max(phases["generation"], training) + phases["weight sync"] + phases["other"]

    @property
    def gpu_hours(self) -> float:
        """Of one step, of all GPUs, busy or not."""
        return self.num_gpus * self.step_seconds / 3600

    @property
    def memory(self) -> list[Phase]:
        """Every phase, on whichever GPU it is."""
        return self.trainer_memory + ([self.sampler_memory] if self.sampler_memory else [])

    @property
    def worst(self) -> Phase:
        """The phase that is short of most, or nearest to it."""
        return max(self.memory, key=lambda phase: phase.total - phase.capacity)

    @property
    def fits(self) -> bool:
        """Whether every phase does."""
        return not self.worst.short

    @property
    def limit(self) -> tuple[str, str]:
        """The longest phase, and what it spends most of its time on."""
        longest = max(self.seconds, key=lambda name: self.phase_seconds[name])
        return longest, max(self.seconds[longest], key=lambda part: self.seconds[longest][part])

    def tokens_per_gpu(self) -> dict[str, float]:
        """Phase -> tokens a second of each GPU that works in it; "step": trained tokens over all GPUs."""
        trained, trainers = self.work.trained_tokens, self.cluster.world_size
        tokens = {name: (trained, trainers) for name in ("log-probs", "reference log-probs", "training")}
        tokens["generation"] = (self.work.generated_tokens, self.rollout_gpus)
        seconds = self.phase_seconds
        rates = {name: count / seconds[name] / gpus for name, (count, gpus) in tokens.items() if seconds.get(name)}
        return rates | {"step": trained / self.step_seconds / self.num_gpus}


def checked(config: Config, cluster: Cluster) -> ModelShape:
    """The model's shape, once every rule between settings and machines holds. Data files are not looked for.

    Raises:
        ConfigError: the first broken rule.
    """
    rollout = config.rollout
    if cluster.rollout_nodes:
        rollout = dataclasses.replace(rollout, servers=["http://rollout-node:8000"])  # addresses come at run time
    trainer = dataclasses.replace(config.trainer, num_nodes=cluster.trainer_nodes, devices=cluster.devices)
    data = dataclasses.replace(config.data, name="arithmetic")  # which needs no file
    check(dataclasses.replace(config, rollout=rollout, trainer=trainer, data=data), cluster.world_size)
    _check_gpus(config, cluster)
    return planned_shape(config)


def planned_shape(config: Config) -> ModelShape:
    """The model's shape.

    Raises:
        ConfigError: nothing says what it is.
    """
    found = model_shape(config.model, config.pretrained_checkpoint.restore_from_path)
    if found is None:
        path = config.model.hf_config_path or config.pretrained_checkpoint.restore_from_path
        raise ConfigError("model", path, "has no config.json", "Write the shape into model.hf_config")
    return shape_of(found)


def _check_gpus(config: Config, cluster: Cluster) -> None:
    own = config.rollout.kind.has_servers and not cluster.rollout_nodes
    own = own and not config.rollout.kind.shares_gpus
    needed = cluster.devices + (cluster.num_servers * config.rollout.vllm.tensor_parallel_size if own else 0)
    if needed > cluster.gpus_per_node:
        key = "trainer.devices + rollout.vllm.num_servers * rollout.vllm.tensor_parallel_size"
        raise ConfigError(key, needed, f"a node has {cluster.gpus_per_node} GPUs", "Lower one, or add --rollout-nodes")
    if not config.rollout.kind.has_servers and cluster.rollout_nodes:
        rule = f"rollout={config.rollout.name} samples in the trainer's own processes"
        raise ConfigError("--rollout-nodes", cluster.rollout_nodes, rule, "Use 0, or add rollout=vllm")
    if cluster.num_servers < 1:
        size = config.rollout.vllm.tensor_parallel_size
        rule = f"a server lies on one node, which has {cluster.gpus_per_node} GPUs"
        raise ConfigError("rollout.vllm.tensor_parallel_size", size, rule, "Lower it")


def estimate(config: Config, cluster: Cluster, means: MeanLengths, software: Software = OURS) -> Plan:
    """What a run takes.

    Args:
        software: of the trainer.
    Raises:
        ConfigError: a rule is broken. A run that does not fit is a Plan, not an error.
    """
    shape, work = checked(config, cluster), workload_of(config, means)
    trainer = Trainer(shape, config.model, cluster.gpu, cluster.world_size, cluster.gpus_per_node, software)
    precision = config.trainer.precision
    sampler, sampler_phase = _sampler(config, shape, cluster, trainer.replicas)
    rows = trainer.rows(work)
    keeps_reference = config.keeps_reference_policy
    batch_tokens = rows.count * rows.tokens
    memory = TrainerMemory(
        world_size=cluster.world_size,
        precision=precision,
        num_micro_batches=rows.count,
        keeps_reference=keeps_reference,
        batch_tokens=batch_tokens,
        keeps_sampler_policy=config.keeps_sampler_policy and not config.reference_is_samplers,
    )
    if not config.rollout.kind.has_servers:
        weights, tokens = shape.num_parameters * sampler.dtype_bytes, sampler.cached_tokens
        cache = tokens * shape.key_value_bytes(sampler.dtype_bytes)
        memory = dataclasses.replace(memory, sampler=weights, sampler_cache=cache)
    elif config.rollout.kind.shares_gpus and sampler_phase is not None:
        memory = dataclasses.replace(memory, server=sampler_phase.parts)
    else:
        memory = dataclasses.replace(memory, feeds_servers=True)
    one_pass = keeps_graph(shape, config.model, memory, cluster.gpu.memory)
    scoring = trainer.scoring(work)
    interval = config.rollout.sync_interval
    syncs = 1 / interval if interval else 0.0  # in a step; offline the first step has the only one
    one_sync = trainer.weight_sync(precision, _to_servers(config, cluster))
    seconds: dict[str, Mapping[str, float]] = {
        "weight sync": {part: syncs * spent for part, spent in one_sync.items()},
        "generation": sampler.seconds(work),
        "log-probs": scoring,
    }
    if keeps_reference:
        seconds["reference log-probs"] = {**scoring, "swapping weights": trainer.reference_swap(precision)}
    seconds |= {"training": trainer.training(work, precision, one_pass)}
    if memory.server is not None:
        seconds["turns"] = {"moving optimizer state": trainer.offload(precision), "servers": TURN_SECONDS}
    seconds |= {"other": {"data, rewards, logging": OTHER_SECONDS}}
    on_servers = sampler.num_servers * sampler.tensor_parallel_size if config.rollout.kind.has_servers else 0
    beside = 0 if config.rollout.kind.shares_gpus else on_servers
    rented = cluster.rollout_nodes * cluster.gpus_per_node or beside
    return Plan(
        config=config,
        cluster=cluster,
        shape=shape,
        work=work,
        num_gpus=cluster.world_size + rented,
        rollout_gpus=on_servers or cluster.world_size,
        replicas=trainer.replicas,
        rows=rows,
        one_pass=one_pass,
        decoded_together=sampler.batch(work),
        trainer_memory=trainer_phases(shape, config.model, memory, cluster.gpu.memory),
        sampler_memory=sampler_phase,
        seconds=seconds,
    )


def _to_servers(config: Config, cluster: Cluster) -> float:
    """Bytes/s from a replica's first rank to its servers."""
    if not config.rollout.kind.has_servers:
        return math.inf
    gpu = cluster.gpu
    if config.rollout.kind.shares_gpus:  # through host memory: every GPU has a bus of its own
        return HOST_COPY_EFFICIENCY * gpu.host_bandwidth
    return LINK_EFFICIENCY * (gpu.network_bandwidth if cluster.rollout_nodes else gpu.nvlink_bandwidth)


def _sampler(config: Config, shape: ModelShape, cluster: Cluster, replicas: int) -> tuple[Sampler, Phase | None]:
    """The servers, or a replica's own sampler; with the memory of a rollout GPU."""
    rollout, size = config.rollout, 2 if config.trainer.precision == "bf16" else 4
    longest = config.data.max_prompt_tokens + rollout.max_tokens
    if not rollout.kind.has_servers:
        tokens = min(rollout.batch_size, MOST_SEQUENCES) * longest
        return Sampler(shape, cluster.gpu, replicas, 1, tokens, rollout.batch_size, EMBEDDED_STEP_SECONDS, size), None
    vllm = rollout.vllm
    utilization = float(vllm.engine_args.get("gpu_memory_utilization", DEFAULT_UTILIZATION))
    memory = sampler_memory(shape, vllm.tensor_parallel_size, utilization, longest, cluster.gpu.memory, size)
    most = min(int(vllm.engine_args.get("max_num_seqs", MOST_SEQUENCES)), vllm.max_concurrency * replicas)
    sampler = Sampler(
        shape, cluster.gpu, cluster.num_servers, vllm.tensor_parallel_size, memory.cached_tokens, most,
        DECODE_STEP_SECONDS, size,
    )  # fmt: skip
    return sampler, memory.phase


def cluster_of(config: Config, gpu: GPU, gpus_per_node: int, nodes: int | None, rollout_nodes: int) -> Cluster:
    """The machines of a config, or of `nodes` nodes in all, those for rollouts among them.

    Raises:
        ConfigError: no node is left for the trainer.
    """
    trainer_nodes = config.trainer.num_nodes if nodes is None else nodes - rollout_nodes
    if trainer_nodes < 1:
        raise ConfigError("--rollout-nodes", rollout_nodes, f"leaves none of {nodes} nodes to the trainer", "Lower it")
    servers = config.rollout.vllm.num_servers
    if rollout_nodes:
        servers = rollout_nodes * (gpus_per_node // config.rollout.vllm.tensor_parallel_size)
    return Cluster(gpu, gpus_per_node, trainer_nodes, config.trainer.devices, rollout_nodes, servers)
