"""A rank over NCCL makes the CPU's update: bit by bit the same program, in other arithmetic."""

import pytest
import torch

from tests.distributed.test_layouts import EXPERT_SHAPES, SHAPES, Update, assert_same_update, of_shapes, run_updates
from tests.gpu.marks import needs_transformer_engine
from tests.support.ranks import WITHOUT_GPU

ALL_SHAPES = SHAPES | EXPERT_SHAPES


@pytest.fixture(scope="module")
def by_cpu(tmp_path_factory) -> dict[str, Update]:
    """fp32 over gloo, the arithmetic that the layout tests compare everything with."""
    return run_updates(tmp_path_factory.mktemp("cpu"), 1, of_shapes({"fp32": {}}, ALL_SHAPES), WITHOUT_GPU)


@pytest.fixture(scope="module")
def by_gpu(tmp_path_factory) -> dict[str, Update]:
    jobs = of_shapes({"local fp32": {"local_layers": True}}, ALL_SHAPES)
    return run_updates(tmp_path_factory.mktemp("gpu"), 1, jobs)


@pytest.fixture(scope="module")
def by_transformer_engine(tmp_path_factory) -> dict[str, Update]:
    folder = tmp_path_factory.mktemp("transformer_engine")
    return run_updates(folder, 1, of_shapes({"bf16": {"precision": "bf16"}}, SHAPES))


@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_local_layers_in_fp32_give_the_update_of_the_cpu(shape, by_gpu, by_cpu):
    assert_same_update(by_gpu[f"local fp32 {shape}"], by_cpu[f"fp32 {shape}"], relative=2e-4)


@needs_transformer_engine
@pytest.mark.parametrize("shape", SHAPES)
def test_transformer_engine_in_bf16_gives_the_same_update_to_bf16s_precision(shape, by_transformer_engine, by_cpu):
    found, expected = by_transformer_engine[f"bf16 {shape}"], by_cpu[f"fp32 {shape}"]
    assert (found["logprobs"] - expected["logprobs"]).abs().mean() < 0.05
    assert float(found["grad_norm"]) == pytest.approx(float(expected["grad_norm"]), rel=0.1)
    moved, reference = (
        torch.cat([update[name].double().flatten() for name in sorted(update) if name.startswith("moved/")])
        for update in (found, expected)
    )
    assert torch.cosine_similarity(moved, reference, dim=0) > 0.98
