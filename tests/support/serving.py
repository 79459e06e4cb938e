"""Tiny models on disk and real vLLM servers for them."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

from nemo_jepo.rollout.vllm.server import KEY_VARIABLE, health_of
from nemo_jepo.utils.network import free_ports
from tests.support.command_line import ENVIRONMENT
from tests.support.small_tokenizers import small_tokenizer
from tests.support.vllm_processes import wait_until

KEY = "a-key-for-tests"
VOCAB = 320
CONFIGS = {"llama": LlamaConfig, "qwen3": Qwen3Config}


def tiny_model(folder: Path, family: str, tied: bool, seed: int) -> PreTrainedModel:
    """A seeded random model with its tokeniser, written as a Hugging Face folder; fp32."""
    config = CONFIGS[family](
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,  # the least that vLLM's attention takes on a CPU
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.2,  # a distribution that is far from uniform
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    small_tokenizer("byte_level").save_pretrained(folder)
    return model


@contextmanager
def running_server(model_folder: Path, *options: str, log: Path) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """`nemo-jepo serve` until the block ends; yields its URL and process when it answers."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "nemo_jepo.cli", "serve", str(model_folder), "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "128", *options]
    with log.open("ab") as file:
        server = subprocess.Popen(command, env=ENVIRONMENT | {KEY_VARIABLE: KEY}, stdout=file, stderr=file)
    try:
        wait_until(lambda: health_of(url) == "good" or server.poll() is not None)
        assert server.poll() is None, log.read_text()[-3000:]
        yield url, server
    finally:
        server.terminate()
        server.wait(60)


def logprobs(model: PreTrainedModel, prompt: tuple[int, ...], token_ids: tuple[int, ...]) -> torch.Tensor:
    """transformers' log-probs of a completion, [T], nats."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + token_ids])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(token_ids)[:, None])[:, 0]
