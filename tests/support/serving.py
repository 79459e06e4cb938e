"""Tiny models on disk and real vLLM servers for them."""

import copy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

from nemo_jepo.rollout.vllm.server import KEY_VARIABLE
from nemo_jepo.rollout.vllm.supervisor import health_of
from nemo_jepo.utils.network import free_ports
from nemo_jepo.utils.processes import die_with_parent
from tests.support.command_line import ENVIRONMENT
from tests.support.small_tokenizers import small_tokenizer
from tests.support.vllm_processes import wait_until

KEY = "a-key-for-tests"
VOCAB = 320
CONFIGS = {"llama": LlamaConfig, "qwen3": Qwen3Config}


def tiny_model(folder: Path, family: str, tied: bool, seed: int, **changes: object) -> PreTrainedModel:
    """A seeded random model with its tokenizer, written as a Hugging Face folder; fp32."""
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,  # the least that vLLM's attention takes on a CPU
        "max_position_embeddings": 256,
        "initializer_range": 0.2,  # a distribution that is far from uniform
    }
    special = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    config = CONFIGS[family](vocab_size=VOCAB, tie_word_embeddings=tied, **special, **(shape | changes))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    small_tokenizer("byte_level").save_pretrained(folder)
    return model


@dataclass(eq=False)
class Server:
    """One `nemo-jepo serve`, its URL and its log."""

    url: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def start_server(
    model_folder: Path,
    *options: str,
    log: Path,
    environment: Mapping[str, str] | None = None,
    port: int | None = None,
    program: Sequence[str] = ("-m", "nemo_jepo.cli"),
) -> Server:
    """`nemo-jepo serve`, not waited for; options of vLLM's own after "--", variables beside those of this process."""
    port = port or free_ports(1)[0]
    command = [sys.executable, *program, "serve", str(model_folder), "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "256", *options]
    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            env=ENVIRONMENT | {KEY_VARIABLE: KEY} | dict(environment or {}),
            stdout=file,
            stderr=file,
            preexec_fn=partial(die_with_parent, signal.SIGTERM),
        )
    return Server(f"http://127.0.0.1:{port}", process, log)


def wait_for(servers: Sequence[Server]) -> None:
    """Until all of them answer."""
    for server in servers:
        wait_until(lambda server=server: health_of(server.url) == "good" or server.process.poll() is not None, 600)
        assert server.process.poll() is None, server.log.read_text()[-3000:]


class SharedServers:
    """Servers for every test of a session that leaves them whole; a test that ends one takes it.

    Two hold the first of two tiny Llamas, and render a chat as its messages' text. They are started when first asked
    for, and again when one was taken.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model_folder = folder / "llama_1"
        self.models = [tiny_model(folder / f"llama_{seed}", "llama", True, seed) for seed in (1, 2)]
        self.key_file = folder / "key"
        self.key_file.touch(0o600)
        self.key_file.write_text(KEY)
        self._template = folder / "chat.jinja"
        self._template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
        self._alike: list[Server] = []
        self._others: list[Server] = []
        self.num_started = 0

    def start(self, model_folder: Path, *options: str) -> Server:
        """One more, for a model of one's own; ended with the others."""
        server = self._start(model_folder, *options)
        self._others.append(server)
        wait_for([server])
        return server

    def alike(self, count: int = 2) -> list[Server]:
        """The first `count` of the shared ones, answering."""
        while len(self._alike) < count:
            self._alike.append(self._start(self.model_folder, "--", "--chat-template", str(self._template)))
        wait_for(self._alike[:count])
        return self._alike[:count]

    def take(self) -> Server:
        """A whole one of the shared model that no other test will get, for a test that ends it."""
        server = self._alike.pop() if self._alike else self._start(self.model_folder)
        self._others.append(server)
        wait_for([server])
        return server

    def give_up(self, server: Server) -> None:
        """One that is no longer as it was: no other test gets it."""
        self._alike.remove(server)
        self._others.append(server)

    def settings(self, count: int = 1) -> list[str]:
        """Of a run that starts from their model and samples from the first `count` of them."""
        urls = ",".join(server.url for server in self.alike(count))
        own = [f"rollout.servers=[{urls}]", f"rollout.vllm.api_key_file={self.key_file}"]
        return [
            "rollout=vllm",
            *own,
            "model.hf_config=null",
            f"pretrained_checkpoint.restore_from_path={self.model_folder}",
        ]

    def close(self) -> None:
        for server in [*self._alike, *self._others]:
            server.end()

    def _start(self, model_folder: Path, *options: str) -> Server:
        self.num_started += 1
        return start_server(model_folder, *options, log=self.folder / f"server_{self.num_started}.log")


def logprobs(
    model: PreTrainedModel, prompt: tuple[int, ...], token_ids: tuple[int, ...], temperature: float = 1.0
) -> torch.Tensor:
    """transformers' log-probs of a completion, [T], nats; in fp32, also of bf16 weights."""
    exact = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
    with torch.no_grad():
        logits = exact(torch.tensor([prompt + token_ids])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(token_ids)[:, None])[:, 0]
