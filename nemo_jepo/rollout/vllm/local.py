"""The vLLM servers that a run starts on its own node: each a `nemo-jepo serve` with a log file."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import VLLMConfig
from nemo_jepo.rollout.vllm.options import vllm_option
from nemo_jepo.rollout.vllm.server import KEY_VARIABLE, vllm_distribution
from nemo_jepo.rollout.vllm.supervisor import STOP
from nemo_jepo.utils.network import free_ports

TRAINERS_OWN = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),  # the trainers' group
    "CUDA_DEVICE_MAX_CONNECTIONS",  # 1 for Megatron, which puts vLLM's streams in a row
    *("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),  # vLLM chooses its allocator
)
"""Variables of a trainer's environment that its servers do not get."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What every server of a run serves."""

    folder: Path
    """config.json and tokenizer; weights come with the first sync."""
    dtype: str
    """float32 or bfloat16."""
    max_model_len: int
    """Tokens of a prompt and its completion."""


class LocalServers:
    """Servers that a run starts and stops.

    Args:
        model: what they serve.
        settings: num_servers, tensor_parallel_size and engine_args are read.
        key: of all of them.
        folder: for the logs, server_0.log and so on.
        first_gpu: GPUs below it are the trainer's.
    """

    def __init__(self, model: ServedModel, settings: VLLMConfig, key: str, folder: Path, first_gpu: int) -> None:
        self._model, self._settings, self._key, self._folder = model, settings, key, folder
        self._first_gpu = first_gpu
        self._ports = free_ports(settings.num_servers)
        self.urls = [f"http://127.0.0.1:{port}" for port in self._ports]
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start them all; none is waited for."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._processes = [self._start(index) for index in range(len(self.urls))]

    def _start(self, index: int) -> "subprocess.Popen[bytes]":
        model, size = self._model, self._settings.tensor_parallel_size
        options = {
            "--dtype": model.dtype,
            "--max-model-len": model.max_model_len,
            "--load-format": "dummy",
            "--port": self._ports[index],
            "--tensor-parallel-size": size,
            "--weight-transfer": "auto" if self._settings.weight_transfer == "file" else self._settings.weight_transfer,
        }
        command = [sys.executable, "-m", "nemo_jepo.cli", "serve", str(model.folder), "--stop-with-parent"]
        command += [str(part) for option in options.items() for part in option]
        if self._settings.engine_args.get("enable_sleep_mode"):
            command.append("--no-restart")  # while it sleeps its GPU is another's: the run starts it again
        command += ["--", *(p for name, value in self._settings.engine_args.items() for p in vllm_option(name, value))]
        environment = {name: value for name, value in os.environ.items() if name not in TRAINERS_OWN}
        environment[KEY_VARIABLE] = self._key
        if vllm_distribution()[0] == "vllm":
            environment["CUDA_VISIBLE_DEVICES"] = gpus_of_server(os.environ, self._first_gpu + index * size, size)
        with (self._folder / f"server_{index}.log").open("ab") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def ended(self) -> dict[str, str]:
        """Servers that are not running, with the last line of their log."""
        return {
            url: f"ended with exit code {process.returncode}; {_last_error(self._folder / f'server_{index}.log')}"
            for index, (url, process) in enumerate(zip(self.urls, self._processes, strict=True))
            if process.poll() is not None
        }

    def restart_dead(self) -> list[str]:
        """Start again those that ended, and say which."""
        dead = list(self.ended())
        for url in dead:
            self._processes[self.urls.index(url)] = self._start(self.urls.index(url))
        return dead

    def stop(self, urls: Sequence[str]) -> None:
        """Stop some of them and wait until nothing is left."""
        processes = [self._processes[self.urls.index(url)] for url in urls]
        for process in processes:
            process.send_signal(STOP)
        for process in processes:
            process.wait()

    def close(self) -> None:
        """Stop them all."""
        self.stop(self.urls[: len(self._processes)])


def gpus_of_server(environment: Mapping[str, str], first: int, number: int) -> str:
    """CUDA_VISIBLE_DEVICES of a server: GPUs from the `first` one on, counted among those that this process sees.

    Raises:
        ConfigError: it sees fewer.
    """
    inherited = environment.get("CUDA_VISIBLE_DEVICES")
    if inherited is None:
        return ",".join(map(str, range(first, first + number)))
    visible = [name.strip() for name in inherited.split(",") if name.strip()]
    if len(visible) < first + number:
        rule = f"shows {len(visible)} GPUs, and trainers and servers need {first + number} or more"
        fix = "Show more, or lower rollout.vllm.num_servers, its tensor_parallel_size or trainer.devices"
        raise ConfigError("CUDA_VISIBLE_DEVICES", inherited, rule, fix)
    return ",".join(visible[first : first + number])


def _last_error(log: Path) -> str:
    """The line of a log that says most, with the log's name."""
    lines = log.read_text(errors="replace").strip().splitlines()
    errors = [line for line in lines if "error" in line.lower()]
    return f"{log}: {(errors or lines or ['empty'])[-1].strip()[-300:]}"
