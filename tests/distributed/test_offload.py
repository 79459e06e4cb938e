"""A trainer that gives its memory up between updates trains bit for bit as one that keeps it."""

from typing import Any

import pytest
import torch

from tests.distributed.offload_jobs import trained
from tests.support.rank_pool import on_ranks

BF16, PLAIN = {"precision": "bf16"}, {"distributed": False}
EXPERTS = {"shape": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "bf16": (1, BF16),
    "fp32, whose main weights are the model's": (1, {}),
    "plain optimizer": (1, PLAIN),
    "plain optimizer bf16": (1, PLAIN | BF16),
    "DP2 bf16": (2, BF16),
    "PP2 tied bf16": (2, {"model": {"pipeline_model_parallel_size": 2}, "tied": True} | BF16),
    "EP2": (2, {"model": {"expert_model_parallel_size": 2}} | EXPERTS),
}


@pytest.mark.parametrize("name", RUNS)
def test_updates_with_the_memory_given_up_between_them_are_the_same_bit_for_bit(name, tmp_path):
    """Also those after a resume from a checkpoint that was saved in such a run."""
    world_size, job = RUNS[name]
    job = {"model": {}} | job
    plain = on_ranks(world_size, trained, job | {"shares": False, "save": str(tmp_path / "plain")})
    shared = on_ranks(world_size, trained, job | {"shares": True, "save": str(tmp_path / "shared")})
    resume = {"shares": True, "resume": str(tmp_path / "shared" / "step_000002")}
    resumed = on_ranks(world_size, trained, job | resume)
    for kept, gave, again in zip(plain, shared, resumed, strict=True):
        assert gave["metrics"] == kept["metrics"] and again["metrics"] == kept["metrics"][2:]
        for state in (gave["state"], again["state"]):
            assert [part for part in kept["state"] if not torch.equal(state[part], kept["state"][part])] == []
        for sizes in (*gave["sizes"], *again["sizes"]):
            assert sizes["meanwhile"] == {"weights": sizes["before"]["weights"], "others": 0}
            assert sizes["after"] == sizes["before"] and sizes["before"]["others"] > 0
        assert len(gave["sizes"]) == 3 and len(again["sizes"]) == 1
