"""A rank over NCCL makes the CPU's update: bit by bit the same program, in other arithmetic."""

from collections.abc import Iterator

import pytest
import torch

from tests.distributed.offload_jobs import given_and_taken
from tests.distributed.test_layouts import EXPERT_SHAPES, SHAPES, assert_same_update, job_of, one_process
from tests.distributed.update_jobs import update
from tests.gpu.marks import needs_transformer_engine
from tests.support.rank_pool import RankPool

ALL_SHAPES = SHAPES | EXPERT_SHAPES


@pytest.fixture(scope="module")
def gpu() -> Iterator[RankPool]:
    with RankPool(1, forked=False) as pool:
        yield pool


@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_fp32_gives_the_update_of_the_cpu(shape, gpu):
    """With local layers, also where Transformer Engine is installed."""
    (found,) = gpu.run(update, job_of(shape))
    assert_same_update(found, one_process(shape), relative=2e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_trainer_gives_its_memory_to_others_and_takes_it_back_unchanged(precision, gpu):
    """All but weights and small change leaves the GPU."""
    (found,) = gpu.run(given_and_taken, {"model": {}, "precision": precision})
    assert found["changed"] == [] and found["sizes"]["meanwhile"]["others"] == 0
    before, meanwhile = found["allocated"]
    assert before - meanwhile >= found["sizes"]["before"]["others"]


@needs_transformer_engine
@pytest.mark.parametrize("shape", SHAPES)
def test_transformer_engine_in_bf16_gives_the_same_update_to_bf16s_precision(shape, gpu):
    (found,), expected = gpu.run(update, job_of(shape, precision="bf16")), one_process(shape)
    assert (found["logprobs"] - expected["logprobs"]).abs().mean() < 0.05
    assert float(found["grad_norm"]) == pytest.approx(float(expected["grad_norm"]), rel=0.1)
    moved, reference = (
        torch.cat([update[name].double().flatten() for name in sorted(update) if name.startswith("moved/")])
        for update in (found, expected)
    )
    assert torch.cosine_similarity(moved, reference, dim=0) > 0.98
