"""The demo learns through real vLLM servers as it does with the embedded sampler."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import ENVIRONMENT, ROOT
from tests.support.vllm_processes import needs_vllm

pytestmark = [needs_vllm, pytest.mark.nightly, pytest.mark.timeout(600)]

NUM_UPDATES = 20


@pytest.fixture(scope="module")
def warm_start(tmp_path_factory) -> Path:
    """The demo's model after its warm-up: it writes chains of thought, most of them wrong."""
    folder = tmp_path_factory.mktemp("demo")
    demo(folder, "warm", 1, "trainer.jepo.max_steps=1", "trainer.jepo.val_at_start=false")
    checkpoints = folder / "warm" / "warmup" / "checkpoints"
    return checkpoints / (checkpoints / "latest").read_text()


def demo(folder: Path, name: str, num_ranks: int, *overrides: str) -> list[dict[str, Any]]:
    """Its validations: the lines of metrics.jsonl that have an accuracy."""
    train = ["-m", "nemo_jepo.cli", "train", "--config-name=demo", f"exp_manager.exp_dir={folder}"]
    train += [f"exp_manager.name={name}", f"trainer.devices={num_ranks}", "data.num_validation_prompts=128", *overrides]
    launch(num_ranks, train)
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "val_rollouts/accuracy" in line]


def launch(num_ranks: int, arguments: list[str]) -> None:
    """`python *arguments` once a rank, by torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks), "--no-python", sys.executable]
    launched = [*torchrun, *arguments] if num_ranks > 1 else arguments
    done = subprocess.run([sys.executable, *launched], env=ENVIRONMENT, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]


def gain(validations: list[dict[str, Any]]) -> float:
    return validations[-1]["val_rollouts/accuracy"] - validations[0]["val_rollouts/accuracy"]


@pytest.fixture(scope="module")
def jepo_stage(warm_start) -> list[str]:
    start = f"pretrained_checkpoint.restore_from_path={warm_start}"
    length = ["trainer.jepo.val_check_interval=0", "trainer.jepo.save_interval=0"]
    return [start, "model.hf_config=null", "warmup.max_steps=0", f"trainer.jepo.max_steps={NUM_UPDATES}", *length]


@pytest.fixture(scope="module")
def embedded_gain(jepo_stage, tmp_path_factory) -> float:
    return gain(demo(tmp_path_factory.mktemp("embedded"), "run", 1, *jepo_stage))


@pytest.mark.parametrize(
    ("num_ranks", "overrides"),
    [
        (2, ["model.tensor_model_parallel_size=2"]),
        (2, ["rollout.vllm.num_servers=2"]),  # two replicas, each feeding one server and drawing from both
    ],
    ids=["one server, TP2 trainer", "two servers, DP2 trainer"],
)
def test_the_demo_learns_through_vllm_as_it_does_embedded(num_ranks, overrides, jepo_stage, embedded_gain, tmp_path):
    validations = demo(tmp_path, "run", num_ranks, "rollout=vllm", *overrides, *jepo_stage)
    assert embedded_gain > 0.2
    # 128 prompts x 4 samples give an accuracy to about 0.03; after 20 updates runs differ by about 0.1.
    assert gain(validations) > 0.2 and abs(gain(validations) - embedded_gain) < 0.25
    assert validations[-1]["val_rollouts/proxy_nll"] < validations[0]["val_rollouts/proxy_nll"]
    assert validations[-1]["val_rollouts/logprob_difference"] < 1e-4
