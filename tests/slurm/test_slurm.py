"""The job scripts on a real Slurm cluster of two nodes, with real training and with a stand-in that takes no time."""

import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.command_line import ROOT, metrics
from tests.support.serving import tiny_model
from tests.support.slurm_cluster import Cluster, needs_slurm, running_cluster
from tests.support.vllm_processes import needs_vllm, wait_until

pytestmark = [needs_slurm, pytest.mark.timeout(600)]

TINY = str(ROOT / "slurm" / "jepo_tiny.sh")
REAL = {"PROJECT_DIR": str(ROOT), "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
NAME = "exp_manager.name=run"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # short: a socket's path has at most 107 characters
    with running_cluster(folder, num_nodes=2) as running:
        yield running
    shutil.rmtree(folder)


@pytest.fixture
def stand_in(tmp_path) -> dict[str, str]:
    """An environment whose `python` is tests/support/slurm_stand_in.py."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/support/slurm_stand_in.py "$@"\n')
    python.chmod(0o755)
    return {"PROJECT_DIR": str(ROOT), "PYTHON": str(python), "STAND_IN": str(tmp_path)}


def calls(folder: Path, command: str) -> list[dict[str, Any]]:
    """The stand-in's calls of one command so far."""
    file = folder / "calls.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [call for call in map(json.loads, lines) if call["command"] == command]


def log(folder: Path, number: str) -> str:
    return (folder / f"jepo-tiny-{number}.log").read_text()


def everything(folder: Path, number: str) -> str:
    """All logs of a job, for a message."""
    files = [folder / f"jepo-tiny-{number}.log", *(folder / "logs" / number).glob("*.log")]
    return "\n".join(f"{file.name}:\n{file.read_text()[-3000:]}" for file in files if file.exists())


def results(folder: Path) -> list[dict[str, Any]]:
    return metrics(folder / "results")


def ranks_of(number: str) -> dict[int, psutil.Process]:
    """The living Python processes of a job by rank."""
    found = {}
    for process in psutil.process_iter():
        try:
            variables = process.environ()
            if variables.get("SLURM_JOB_ID") == number and "RANK" in variables and "python" in process.name():
                found[int(variables["RANK"])] = process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


# ---- Real training.


@pytest.fixture(scope="module")
def uninterrupted(cluster, tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    number = cluster.submit(folder, REAL, TINY, NAME)
    job = cluster.wait(number)
    assert job["JobState"] == "COMPLETED", everything(folder, number)
    return folder, number


def test_a_job_trains_over_both_nodes(uninterrupted):
    folder, number = uninterrupted
    lines = results(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["train_optim/grad_norm"] > 0 for line in lines)
    assert "trainer.num_nodes=2 trainer.devices=1" in log(folder, number)
    logs = {path.name for path in (folder / "logs" / number).iterdir()}
    assert {"preflight-node1.log", "preflight-node2.log"} < logs
    assert "hold together for 2 trainer ranks" in (folder / "logs" / number / "preflight-node2.log").read_text()
    assert "server_key" not in logs


def test_a_time_limit_saves_and_requeues_and_the_job_ends_as_if_uninterrupted(cluster, uninterrupted, tmp_path):
    # The signal may come 10 to 30 seconds after the start: preflight takes none, the first start is held until then.
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
case "$3$SLURM_RESTART_COUNT" in
--help*) echo "commands: doctor train"; exit ;;
doctor*) exit ;;
train) until grep -q "the run is asked" "jepo-tiny-$SLURM_JOB_ID.log"; do sleep 0.1; done ;;
esac
exec {sys.executable} "$@"
"""
    )
    python.chmod(0o755)
    limits = ["--time=5", "--signal=B:USR1@290"]
    number = cluster.submit(
        tmp_path, REAL | {"PYTHON": str(python)}, *limits, TINY, NAME, "trainer.jepo.save_interval=0"
    )
    wait_until(lambda: cluster.job(number)["Restarts"] == "1", seconds=300)
    cluster.run("scontrol", "update", f"JobId={number}", "TimeLimit=20")
    before = results(tmp_path)
    assert cluster.wait(number)["JobState"] == "COMPLETED", everything(tmp_path, number)
    assert 1 <= len(before) < 6
    assert log(tmp_path, number).count("the run has saved; the job goes back into the queue") == 1
    assert results(tmp_path) == results(uninterrupted[0])


def test_a_wrong_setting_is_found_by_the_doctor_on_every_node(cluster, tmp_path):
    number = cluster.submit(tmp_path, REAL, TINY, NAME, "trainer.jepo.num_prompts_per_step=3")
    assert cluster.wait(number)["JobState"] == "FAILED"
    for node in ("node1", "node2"):
        assert f"preflight failed on {node}: the doctor found (exit code 2" in log(tmp_path, number)
    assert "must be a multiple of the 2 data-parallel replicas" in log(tmp_path, number)


@needs_vllm
def test_the_second_node_can_serve_rollouts_for_the_first(cluster, tmp_path):
    tiny_model(tmp_path / "model", "llama", tied=True, seed=1)
    rollout_node = {"ROLLOUT_NODES": "1", "MODEL": str(tmp_path / "model")}
    steps = ["trainer.jepo.max_steps=2", "model.tokens_per_micro_batch=256"]
    number = cluster.submit(tmp_path, REAL | rollout_node, TINY, NAME, *steps)
    assert cluster.wait(number, 400)["JobState"] == "COMPLETED", everything(tmp_path, number)
    lines = results(tmp_path)
    assert len(lines) == 2
    assert all(line["train_rollouts/servers"] == 1 for line in lines)
    assert all(line["train_rollouts/failed_samples"] == 0 for line in lines)


# ---- A stand-in for nemo-jepo: what the scripts themselves do.


def start(cluster: Cluster, folder: Path, environment: dict[str, str], *overrides: str) -> str:
    return cluster.submit(folder, environment, "--exclusive", TINY, *overrides)


def test_ranks_servers_and_the_doctor_get_what_they_need(cluster, stand_in, tmp_path):
    (tmp_path / "end_training").write_text("0")
    more = {"ROLLOUT_NODES": "1", "TRAINERS_PER_NODE": "2", "SERVERS_PER_NODE": "2", "MODEL": "/models/tiny"}
    more |= {"WANDB_API_KEY": "x", "CUDA_VISIBLE_DEVICES": "4,6"}
    number = start(cluster, tmp_path, stand_in | more, "trainer.jepo.max_steps=9")
    assert cluster.wait(number)["JobState"] == "COMPLETED", everything(tmp_path, number)

    trainers = calls(tmp_path, "train")
    assert [call["node"] for call in trainers] == ["node1", "node1"]
    places = [call["environment"] for call in trainers]
    assert {(place["RANK"], place["LOCAL_RANK"], place["WORLD_SIZE"]) for place in places} == {
        ("0", "0", "2"),
        ("1", "1", "2"),
    }
    port = 10000 + int(number) % 20000
    assert {(place["MASTER_ADDR"], place["MASTER_PORT"]) for place in places} == {("127.0.1.1", str(port))}
    arguments = trainers[0]["arguments"]
    assert arguments[0] == "--config-name=jepo_tiny"
    assert {"trainer.num_nodes=1", "trainer.devices=2", "exp_manager.create_wandb_logger=true"} < set(arguments)
    urls = f"http://127.0.1.2:{port + 1},http://127.0.1.2:{port + 2}"
    assert f"rollout.servers=[{urls}]" in arguments
    assert arguments[-1] == "trainer.jepo.max_steps=9"  # the user's come last and win

    servers = sorted(calls(tmp_path, "serve"), key=lambda call: call["arguments"])
    assert [call["node"] for call in servers] == ["node2", "node2"]
    assert [call["environment"]["CUDA_VISIBLE_DEVICES"] for call in servers] == ["4", "6"]
    assert servers[0]["arguments"][:5] == ["/models/tiny", "--host", "127.0.1.2", "--port", str(port + 1)]
    assert not {"RANK", "MASTER_ADDR", "CUDA_DEVICE_MAX_CONNECTIONS"} & set(servers[0]["environment"])
    assert {place["CUDA_DEVICE_MAX_CONNECTIONS"] for place in places} == {"1"}
    assert {place["PYTORCH_CUDA_ALLOC_CONF"] for place in places} == {"expandable_segments:True"}

    doctors = calls(tmp_path, "doctor")
    assert {call["node"] for call in doctors} == {"node1", "node2"}
    assert all(call["arguments"] == arguments and call["environment"]["WORLD_SIZE"] == "2" for call in doctors)


def test_the_servers_key_is_readable_by_its_owner_alone_and_goes_with_the_job(cluster, stand_in, tmp_path):
    number = start(cluster, tmp_path, stand_in | {"ROLLOUT_NODES": "1", "MODEL": "/models/tiny"})
    wait_until(lambda: calls(tmp_path, "train"), seconds=60)
    key = tmp_path / "logs" / number / "server_key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600 and len(key.read_text()) > 32
    assert f"rollout.vllm.api_key_file={key}" in calls(tmp_path, "train")[0]["arguments"]
    (serve,) = calls(tmp_path, "serve")
    assert str(key) in serve["arguments"]
    assert serve["environment"]["CUDA_VISIBLE_DEVICES"] == "0"  # where the task's environment says nothing
    assert key.read_text() not in log(tmp_path, number)
    (tmp_path / "end_training").write_text("0")
    assert cluster.wait(number)["JobState"] == "COMPLETED", everything(tmp_path, number)
    assert not key.exists()


def test_a_dead_rank_ends_the_job_at_once(cluster, stand_in, tmp_path):
    number = start(cluster, tmp_path, stand_in)
    wait_until(lambda: len(ranks_of(number)) == 2 and len(calls(tmp_path, "train")) == 2, seconds=60)
    ranks_of(number)[1].kill()
    job = cluster.wait(number, seconds=120)  # by itself the other rank would never end
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "0")
    assert "task 1: Exited with exit code 137" in log(tmp_path, number)
    wait_until(lambda: not ranks_of(number), seconds=10)


def test_a_run_that_fails_is_not_requeued(cluster, stand_in, tmp_path):
    (tmp_path / "end_training").write_text("2")
    number = start(cluster, tmp_path, stand_in)
    job = cluster.wait(number)
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "0")
    assert "the trainers ended with exit code 2" in log(tmp_path, number)


def test_a_run_that_saved_by_itself_is_requeued_until_its_restarts_are_used_up(cluster, stand_in, tmp_path):
    (tmp_path / "end_training").write_text("75")
    number = start(cluster, tmp_path, stand_in | {"MAX_RESTARTS": "1"})
    wait_until(lambda: cluster.job(number)["JobState"] == "FAILED", seconds=100)
    assert cluster.job(number)["Restarts"] == "1"
    assert {call["environment"].get("SLURM_RESTART_COUNT") for call in calls(tmp_path, "train")} == {None, "1"}
    assert "submit it once more to go on" in log(tmp_path, number)


def test_a_server_that_dies_is_started_again(cluster, stand_in, tmp_path):
    (tmp_path / "die_once").touch()
    number = start(cluster, tmp_path, stand_in | {"ROLLOUT_NODES": "1", "MODEL": "/models/tiny"})
    wait_until(lambda: calls(tmp_path, "train"), seconds=60)  # so it answers
    assert len(calls(tmp_path, "serve")) == 2
    (tmp_path / "end_training").write_text("0")
    assert cluster.wait(number)["JobState"] == "COMPLETED", everything(tmp_path, number)


def test_servers_that_never_answer_end_the_job_at_the_deadline(cluster, stand_in, tmp_path):
    mute = {"ROLLOUT_NODES": "1", "MODEL": "/models/tiny", "STAND_IN_MUTE": "1", "SERVER_TIMEOUT": "4"}
    number = start(cluster, tmp_path, stand_in | mute)
    assert cluster.wait(number, seconds=90)["JobState"] == "FAILED"
    assert "no answer within 4 s from http://127.0.1.2:" in log(tmp_path, number)
    assert not calls(tmp_path, "train")


def test_rollout_servers_that_end_take_the_job_with_them(cluster, stand_in, tmp_path):
    number = start(cluster, tmp_path, stand_in | {"ROLLOUT_NODES": "1", "MODEL": "/models/tiny"})
    wait_until(lambda: calls(tmp_path, "train"), seconds=60)
    server = psutil.Process(calls(tmp_path, "serve")[0]["pid"])
    for process in (server.parent(), server):  # the task that would start it again, then the server
        process.kill()
    assert cluster.wait(number, seconds=60)["JobState"] == "FAILED"
    text = log(tmp_path, number)
    assert "the rollout servers ended" in text and "the run has saved; submit it again" in text


def test_a_failed_preflight_names_the_node_and_nothing_is_started(cluster, stand_in, tmp_path):
    number = start(cluster, tmp_path, stand_in | {"STAND_IN_SICK_NODE": "node2"})
    assert cluster.wait(number)["JobState"] == "FAILED"
    text = log(tmp_path, number)
    assert "preflight failed on node2: the doctor found (exit code 2" in text
    assert "blocker GPU number 3 is gone" in text
    assert "failed on node1" not in text
    assert not calls(tmp_path, "train")


def test_a_python_that_does_not_run_is_found_before_anything_starts(cluster, tmp_path):
    number = start(cluster, tmp_path, {"PROJECT_DIR": str(ROOT), "PYTHON": "/nowhere/python"})
    assert cluster.wait(number)["JobState"] == "FAILED"
    assert "preflight failed on node1: /nowhere/python -m nemo_jepo.cli does not run" in log(tmp_path, number)


def test_nodes_that_are_all_rollout_nodes_are_refused(cluster, stand_in, tmp_path):
    number = start(cluster, tmp_path, stand_in | {"ROLLOUT_NODES": "2", "MODEL": "/models/tiny"})
    assert cluster.wait(number)["JobState"] == "FAILED"
    assert "ROLLOUT_NODES=2 of 2 nodes leaves none to train on" in log(tmp_path, number)


def test_nothing_of_a_job_is_left_when_it_is_cancelled(cluster, stand_in, tmp_path):
    number = start(cluster, tmp_path, stand_in | {"ROLLOUT_NODES": "1", "MODEL": "/models/tiny"})
    wait_until(lambda: calls(tmp_path, "train"), seconds=60)
    started = [call["pid"] for command in ("serve", "train") for call in calls(tmp_path, command)]
    cluster.run("scancel", number)
    assert cluster.wait(number, seconds=60)["JobState"] == "CANCELLED"
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in started), seconds=20)
    assert os.listdir(tmp_path / "logs" / number)
