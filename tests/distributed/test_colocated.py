"""A run whose servers share the trainers' GPUs trains as one whose servers have their own, to the bit."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.colocated_jobs import trained
from tests.support.rank_pool import on_ranks

SETTINGS = [
    "rollout.vllm.weight_transfer=file",
    "rollout.vllm.parity_tolerance=1e9",  # fakes draw from nothing
    "rollout.vllm.max_concurrency=1",  # siblings are drawn in their order
    "warmup.max_steps=1",
    "trainer.jepo.val_check_interval=2",
]


def weights(folder: Path) -> dict[str, str]:
    """Checksums of the last checkpoint's tensors."""
    checksums = json.loads((folder / "run" / "checkpoints" / "step_000004" / "complete.json").read_text())["sha256"]
    return {name: value for name, value in checksums.items() if name.endswith(".distcp")}


def untimed(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics that depend on neither clock nor host."""
    measured = ("timers/", "memory/", "throughput/")
    return [{key: value for key, value in line.items() if not key.startswith(measured)} for line in metrics]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_on_shared_gpus_gives_the_same_checkpoint_and_metrics(world_size, tmp_path):
    """A warm-up, four steps, two validations with greedy answers; the run on shared GPUs ends after two and goes on.

    The fakes fail where something is asked of a sleeping server, the job where a trainer works while one is awake.
    """
    ranks = [f"trainer.devices={world_size}", f"rollout.vllm.num_servers={world_size}"]
    job = {"overrides": [*SETTINGS, *ranks, "rollout=vllm"], "ends": [4], "folder": str(tmp_path / "own")}
    own = on_ranks(world_size, trained, job)[0]
    job = {
        "overrides": [*SETTINGS, *ranks, "rollout=vllm_colocated"],
        "ends": [2, 4],
        "folder": str(tmp_path / "shared"),
    }
    shared = on_ranks(world_size, trained, job)[0]
    assert own["codes"] == [0] and shared["codes"] == [0, 0]
    assert own["given"] == ({}, world_size) and shared["given"][0]["enable_sleep_mode"] and shared["given"][1] == 0
    assert len(own["metrics"]) == len(shared["metrics"]) == 4
    for line, again in zip(untimed(own["metrics"]), untimed(shared["metrics"]), strict=True):
        assert {key: (line[key], again.get(key)) for key in line if again.get(key) != line[key]} == {}
    assert weights(tmp_path / "own") == weights(tmp_path / "shared")
    assert not any("sleep" in event or "wake" in event for log in own["logs"] for event in log)
    for log in shared["logs"]:
        assert log[0] == "sleep?level=2&mode=abort" and log[-1] == log[0]
