"""Which sampler a run uses, and the vLLM servers that it starts for itself."""

import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from nemo_jepo.actor.actor import DTYPES
from nemo_jepo.actor.parallel import Layout
from nemo_jepo.actor.weights.load import hf_shapes
from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import Config, RolloutConfig, VLLMConfig
from nemo_jepo.rollout.sampler import GenerationRequest, Sampler
from nemo_jepo.rollout.vllm.local import LocalServers, ServedModel
from nemo_jepo.rollout.vllm.server import read_key, vllm_distribution


class OwnServers:
    """The vLLM servers of a run; with rollout.servers=auto it starts them, and this context manager stops them.

    They serve a warm-up and the run after it.

    Args:
        folder: of the run; logs and the model's description go to <folder>/servers.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "servers"
        self.addresses: tuple[tuple[str, ...], str] | None = None
        """URLs and key; None before `start`, and with another sampler."""
        self.started: LocalServers | None = None
        """Those that this rank started itself; None on every rank but 0."""

    def start(
        self, config: Config, layout: Layout, hf_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Know the servers' addresses on every rank; with auto, rank 0 starts them, and nobody waits until they answer.

        Raises:
            ConfigError: vLLM is not installed, or the servers' key cannot be read.
        """
        if not config.rollout.kind.has_servers or self.addresses is not None:
            return
        vllm_distribution()
        urls = config.rollout.server_urls()
        if urls is not None:
            self.addresses = urls, read_key(config.rollout.vllm.api_key_file)
            return
        check_gpus(config.rollout.vllm, config.trainer.devices)
        if layout.rank == 0:
            model_folder, key = self.folder / "model", secrets.token_urlsafe(32)
            hf_config.save_pretrained(model_folder)
            tokenizer.save_pretrained(model_folder)
            dtype = {"fp32": "float32", "bf16": "bfloat16"}[config.trainer.precision]
            generated = max(config.rollout.max_tokens, config.evaluation.max_tokens or 0)
            longest = min(config.data.max_prompt_tokens + generated, hf_config.max_position_embeddings)
            model = ServedModel(model_folder, dtype, longest)
            self.started = LocalServers(model, config.rollout.vllm, key, self.folder, config.trainer.devices)
            self.started.start()
            self.addresses = tuple(self.started.urls), key
        self.addresses = layout.share_over_world(self.addresses)

    def __enter__(self) -> "OwnServers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.started is not None:
            self.started.close()


def check_gpus(vllm: VLLMConfig, trainer_gpus: int) -> None:
    """Raise ConfigError unless the node's GPUs suffice for the trainer and the servers beside it."""
    needed = trainer_gpus + vllm.num_servers * vllm.tensor_parallel_size
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
    from nemo_jepo.rollout.vllm.pool import Pool
    from nemo_jepo.rollout.vllm.push import WeightTransfer
    from nemo_jepo.rollout.vllm.sampler import VLLMSampler

    urls, key = servers.addresses
    pool = Pool(urls, config.rollout.vllm, key, hf_config.vocab_size)
    shapes = list(hf_shapes(hf_config).items())
    transfer = WeightTransfer(pool.control, config.rollout.vllm, shapes, dtype, servers.folder / "weights")
    own = urls[layout.data_parallel_rank :: layout.data_parallel_size]
    return VLLMSampler(pool, transfer, own, config.answer.marker, config.rollout.vllm.start_timeout_s, servers.started)


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
