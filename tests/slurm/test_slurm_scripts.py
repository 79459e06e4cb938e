"""What the H100 jobs would run: their steps, nodes, ranks, container flags and overrides. No Slurm needed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_jepo.config.compose import compose, resolve
from tests.support.command_line import ROOT

SCRIPTS = sorted(path.name for path in (ROOT / "slurm").glob("jepo_*.sh"))
MODEL = {"MODEL": "/models/llama", "TRAIN_DATA": "/data/train.jsonl"}


def run_script(name: str, folder: Path, num_nodes: int, *overrides: str, **variables: str):
    """The finished script, started with a job's variables and with tests/support/slurm_commands.py in Slurm's place."""
    commands = folder / "bin"
    commands.mkdir()
    for command in ("srun", "scontrol", "scancel"):
        (commands / command).write_text(
            f"#!{sys.executable}\n" + (ROOT / "tests" / "support" / "slurm_commands.py").read_text()
        )
        (commands / command).chmod(0o755)
    job = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": "node[1-n]", "SLURM_JOB_NUM_NODES": str(num_nodes)}
    job |= {"SLURM_SUBMIT_DIR": str(folder), "PROJECT_DIR": str(ROOT), "RECORD": str(folder), "HOME": str(folder)}
    job |= {"PATH": f"{commands}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", str(ROOT / "slurm" / name), *overrides],
        env=job | variables,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
    )


def steps(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "srun.jsonl").read_text().splitlines()]


def options(step: list[str]) -> dict[str, str]:
    """srun's own options, up to the command."""
    flags = [part for part in step[: step.index("bash")] if part.startswith("--")]
    return {name: value for name, _, value in (flag.partition("=") for flag in flags)}


def nodes(first: int, last: int) -> str:
    return ",".join(f"node{index}" for index in range(first, last + 1))


def test_jepo_70b_trains_on_half_of_its_nodes_and_samples_on_the_others(tmp_path):
    container = {"CONTAINER": "/images/nemo-jepo.sqsh", "MOUNTS": "/data:/data,/models:/models"}
    more = {"HF_HOME": "/cache/hf", "WANDB_API_KEY": "secret", "VALIDATION_DATA": "/data/test.jsonl"}
    done = run_script("jepo_70b.sh", tmp_path, 16, "trainer.jepo.max_steps=5", **MODEL, **container, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    preflight, servers, trainers = steps(tmp_path)

    where = ("--nodes", "--ntasks", "--ntasks-per-node", "--nodelist")
    assert [options(preflight)[name] for name in where] == ["16", "16", "1", nodes(1, 16)]
    assert [options(servers)[name] for name in where] == ["8", "16", "2", nodes(9, 16)]
    assert [options(trainers)[name] for name in where] == ["8", "64", "8", nodes(1, 8)]
    for step in (preflight, servers, trainers):
        flags = options(step)
        assert flags["--container-image"] == "/images/nemo-jepo.sqsh"
        mounts = [f"{tmp_path}/logs/4242:{tmp_path}/logs/4242", container["MOUNTS"], "/cache/hf:/cache/hf"]
        assert flags["--container-mounts"] == ",".join(mounts)
        assert "--no-container-mount-home" in flags
    assert options(trainers)["--kill-on-bad-exit"] == options(servers)["--kill-on-bad-exit"] == "1"
    assert options(trainers)["--output"] == f"{tmp_path}/logs/4242/trainer-%N.log"

    port = 10000 + 4242
    serve = servers[servers.index("server_task") + 1 :]
    assert serve[0].split() == [f"node{index}=127.0.2.{index}" for index in range(9, 17)]
    assert serve[1:5] == [str(port), "4", "python3", "/models/llama"]
    assert serve[5:] == (
        ["--api-key-file", f"{tmp_path}/logs/4242/server_key"]
        + ["--tensor-parallel-size", "4", "--dtype", "bfloat16", "--load-format", "dummy"]
        + ["--", "--gpu-memory-utilization", "0.85"]
    )
    recipe = resolve(compose("jepo_70b", [])).rollout.vllm  # what the planner counts with
    assert (recipe.tensor_parallel_size, recipe.engine_args) == (4, {"gpu_memory_utilization": 0.85})

    train = trainers[trainers.index("trainer_task") + 1 :]
    assert train[:2] == ["127.0.2.1", str(port)]
    assert train[4:8] == ["python3", "-m", "nemo_jepo.cli", "train"]
    urls = ",".join(f"http://127.0.2.{index}:{port + 1 + one}" for index in range(9, 17) for one in (0, 1))
    assert train[8:] == [
        "--config-name=jepo_70b",
        f"exp_manager.exp_dir={tmp_path}/results",
        "trainer.num_nodes=8",
        "trainer.devices=8",
        "exp_manager.create_wandb_logger=true",
        "pretrained_checkpoint.restore_from_path=/models/llama",
        "data.train_path=/data/train.jsonl",
        "data.validation_path=/data/test.jsonl",
        f"rollout.servers=[{urls}]",
        f"rollout.vllm.api_key_file={tmp_path}/logs/4242/server_key",
        "trainer.jepo.max_steps=5",
    ]
    assert "secret" not in done.stdout + done.stderr


def test_a_rollout_node_can_hold_several_servers_and_any_number_of_nodes_may_sample(tmp_path):
    shape = {"ROLLOUT_NODES": "1", "SERVER_TENSOR_PARALLEL_SIZE": "2", "SRUN_OPTIONS": "--mpi=none --export=ALL"}
    done = run_script("jepo_70b.sh", tmp_path, 5, **MODEL, **shape, PYTHON="/venv/bin/python")
    assert done.returncode == 0, done.stdout + done.stderr
    preflight, servers, trainers = steps(tmp_path)
    assert options(servers)["--ntasks-per-node"] == "4" and options(servers)["--nodelist"] == "node5"
    assert options(trainers)["--ntasks"] == "32"
    assert options(trainers)["--mpi"] == "none" and "--container-image" not in options(trainers)
    assert f"rollout.servers=[{','.join(f'http://127.0.2.5:{port}' for port in range(14243, 14247))}]" in trainers
    assert "/venv/bin/python" in trainers


def test_jepo_8b_lets_the_run_start_servers_on_the_other_half_of_the_gpus(tmp_path):
    done = run_script("jepo_8b.sh", tmp_path, 1, "trainer.devices=6", "rollout.vllm.num_servers=2", **MODEL)
    assert done.returncode == 0, done.stdout + done.stderr
    preflight, trainers = steps(tmp_path)
    assert options(trainers)["--ntasks"] == options(trainers)["--ntasks-per-node"] == "4"
    assert f"{ROOT}/.venv/bin/python" in trainers
    train = trainers[trainers.index("--config-name=jepo_8b") :]
    assert train[2:4] == ["trainer.num_nodes=1", "trainer.devices=4"]
    assert "rollout.vllm.num_servers=4" in train
    assert not any("rollout.servers" in part for part in train)
    assert train[-2:] == ["trainer.devices=6", "rollout.vllm.num_servers=2"]


@pytest.mark.parametrize(
    ("script", "variables", "message"),
    [
        ("jepo_8b.sh", {}, "MODEL: folder of the Hugging Face model"),
        ("jepo_70b.sh", {"MODEL": "/m"}, "TRAIN_DATA: JSONL or Parquet file"),
        ("jepo_70b.sh", MODEL | {"CONTAINER": "x.sqsh"}, "MOUNTS: comma-separated SOURCE:TARGET"),
        ("jepo_tiny.sh", {"ROLLOUT_NODES": "1"}, "MODEL: folder of a small Hugging Face model"),
        ("jepo_tiny.sh", {"SLURM_JOB_ID": ""}, "SLURM_JOB_ID: start this script with sbatch"),
    ],
)
def test_a_missing_variable_is_named_with_its_meaning(script, variables, message, tmp_path):
    done = run_script(script, tmp_path, 2, **variables)
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "srun.jsonl").exists()


def test_a_rank_counts_its_gpus_from_a_variable(tmp_path):
    done = run_script("jepo_8b.sh", tmp_path, 1, **MODEL, GPUS_PER_NODE="4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert options(steps(tmp_path)[1])["--ntasks"] == "2"


def test_a_script_runs_another_recipe_of_its_size(tmp_path):
    done = run_script("jepo_8b.sh", tmp_path, 1, **MODEL, CONFIG="jepo_8b_async")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--config-name=jepo_8b_async" in steps(tmp_path)[1]


def test_trainers_on_all_gpus_leave_the_servers_to_the_recipe(tmp_path):
    done = run_script("jepo_8b.sh", tmp_path, 1, **MODEL, CONFIG="jepo_8b_colocated", TRAINERS_PER_NODE="8")
    assert done.returncode == 0, done.stdout + done.stderr
    _, trainers = steps(tmp_path)
    assert options(trainers)["--ntasks"] == "8" and "trainer.devices=8" in trainers
    assert not any("num_servers" in part for part in trainers)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_job_can_be_requeued_before_its_time_limit_and_keeps_its_log(name):
    header = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)", (ROOT / "slurm" / name).read_text(), re.MULTILINE))
    assert header["signal"].startswith("B:USR1@")  # to the batch shell alone
    assert "requeue" in header and header["open-mode"] == "append"
    assert header["nodes"] == {"jepo_8b.sh": "1", "jepo_70b.sh": "16", "jepo_tiny.sh": "2"}[name]
    assert not {"account", "partition"} & set(header)  # the site's, from sbatch's command line
