"""Run `nemo-jepo` as a user does, on a model and a data set that take seconds."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support import fork_server

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

# The marker is one that a random model writes by chance, so bounds, advantages and gradients are not zero.
TINY = [
    "--config-name=demo",
    "model.hf_config.hidden_size=32",
    "model.hf_config.num_hidden_layers=2",
    "model.hf_config.intermediate_size=48",
    "model.tokens_per_micro_batch=128",
    "model.optim.lr=1e-3",
    "tokenizer.train_vocab_size=270",
    "data.arithmetic.num_train=60",
    "data.arithmetic.num_validation=6",
    "data.num_validation_prompts=6",
    "answer.marker=e",
    "rollout.max_tokens=60",
    "warmup.max_steps=0",
    "trainer.jepo.num_prompts_per_step=4",
    "trainer.jepo.num_generations_per_prompt=4",
    "trainer.jepo.val_at_start=false",
    "trainer.jepo.val_check_interval=3",
    "trainer.jepo.max_steps=6",
    "trainer.jepo.save_interval=2",
    "exp_manager.create_tensorboard_logger=false",
]


def command(name: str, folder: Path, *overrides: str) -> list[str]:
    """What stands behind `python`: the tiny run of a folder."""
    return ["-m", "nemo_jepo.cli", name, *TINY, f"exp_manager.exp_dir={folder}", "exp_manager.name=run", *overrides]


def run(
    name: str, folder: Path, *overrides: str, expect: int = 0, environment: Mapping[str, str] = ENVIRONMENT
) -> subprocess.CompletedProcess[str]:
    """`nemo-jepo NAME` on the tiny run, in a child of the fork server."""
    done = fork_server.run(command(name, folder, *overrides), environment=environment)
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def true_command(name: str, folder: Path, *overrides: str) -> list[str]:
    """The same as a user types it: the installed program, which imports everything itself."""
    return [str(Path(sys.executable).parent / "nemo-jepo"), *command(name, folder, *overrides)[2:]]


def run_truly(name: str, folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        true_command(name, folder, *overrides), env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The run's metrics without those that time and memory decide."""
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    noisy = ("timers/", "throughput/", "memory/")
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(noisy)} for line in lines]
