"""Hugging Face -> Megatron -> Hugging Face, bit for bit, in every layout."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_jepo.actor.weights.load import SeededWeights, hf_shapes
from tests.distributed.stream_jobs import repeated, stream, traffic
from tests.support.hf_models import SHAPES, on_disk, random_model, save
from tests.support.rank_pool import on_ranks

TP2, PP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}, {"pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "DP2": (2, {}),
    "TP2": (2, TP2),
    "PP2": (2, PP2),
    "PP2, 3 layers and 1": (2, PP2 | {"num_layers_in_last_pipeline_stage": 1}),
    "PP2 in 4 chunks": (2, PP2 | {"virtual_pipeline_model_parallel_size": 2}),
    "CP2": (2, {"context_parallel_size": 2}),
    "EP2": (2, EP2),
    "TP2xPP2": (4, TP2 | PP2),
    "EP2xPP2": (4, EP2 | PP2),
    "EP4 over TP2": (4, TP2 | {"expert_model_parallel_size": 4}),
}
# llama3 and the other router differ from these in numbers that no weight holds; llama's weights are among qwen2's.
FAMILIES = ("qwen2", "qwen3", "qwen3_moe", "mixtral")
CASES = [
    (layout, f"{family} {head}")
    for layout in LAYOUTS
    for family in FAMILIES
    for head in (("tied", "untied") if "PP2" in layout else ("untied",))  # pipelines put the two in different places
    if "num_local_experts" in SHAPES[f"{family} {head}"] or not layout.startswith("EP")
]
CASES += [("TP2xPP2", "llama untied")]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("streams")


@functools.cache
def model_of(shape: str, root: Path) -> tuple[str, Tensors]:
    """Its folder, and the tensors there."""
    model = random_model(shape)
    return save(model, root / shape), on_disk(model)


def streamed(layout: str, **job: Any) -> Tensors:
    world_size, model = LAYOUTS[layout]
    return on_ranks(world_size, stream, job | {"model": model})[0]


@pytest.mark.parametrize(("layout", "shape"), CASES)
def test_the_stream_gives_back_the_folder_bit_for_bit(layout, shape, root):
    folder, expected = model_of(shape, root)
    found = streamed(layout, shape=SHAPES[shape], folder=folder, seed=0)
    assert set(found) == set(expected) and list(found) == list(hf_shapes(random_model(shape).config))
    for name in found:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if not layout.startswith("EP")])
def test_a_seed_gives_the_same_model_in_every_layout(layout):
    found = streamed(layout, shape=SHAPES["qwen2 untied"], folder=None, seed=7)
    source = SeededWeights({name: tuple(tensor.shape) for name, tensor in found.items()}, 0.2, seed=7)
    for name, tensor in found.items():
        assert torch.equal(tensor, source.read(name)), name


def test_a_layer_goes_once_through_its_tensor_group_and_once_to_the_first_rank():
    """Ranks 0 and 1 hold the first stage, 2 and 3 the last: rank 2 alone sends, and only to rank 0."""
    ranks = on_ranks(4, traffic, {"shape": SHAPES["qwen2 untied"], "model": LAYOUTS["TP2xPP2"][1]})
    for rank in ranks:
        assert rank["all_gather_into_tensor"] == rank["own"]
        assert "broadcast" not in rank
    assert [rank.get("send", 0) for rank in ranks] == [0, 0, 2 * ranks[2]["own"], 0]
    assert [rank.get("recv", 0) for rank in ranks] == [2 * ranks[2]["own"], 0, 0, 0]
    assert [bool(rank["read"]) for rank in ranks] == [True, False, False, False]


def test_experts_are_gathered_by_every_replica_at_once():
    """Two replicas of one rank, half of the experts each: all of them to both, nothing else is sent."""
    first, second = on_ranks(2, traffic, {"shape": SHAPES["mixtral untied"], "model": LAYOUTS["EP2"][1]})
    experts = first["read"] - first["own"]  # what the other rank holds, and as much again of its own
    for rank in (first, second):
        assert rank["all_gather_into_tensor"] == experts and "send" not in rank and "broadcast" not in rank


def test_all_ranks_make_the_stream_again_when_one_replica_wants_it_again():
    """Two replicas of TP 2; the first lost two servers, the second none."""
    job = {"shape": SHAPES["qwen2 untied"], "model": TP2, "times": [3, 1]}
    assert on_ranks(4, repeated, job) == [(3, 3), (3, 0), (3, 1), (3, 0)]


def test_seeded_weights_are_normal_with_unit_norms_and_zero_biases():
    shapes = {"model.norm.weight": (8,), "q_proj.bias": (8,), "a.weight": (300, 100), "b.weight": (300, 100)}
    source = SeededWeights(shapes, 0.2, seed=1)
    assert torch.equal(source.read("model.norm.weight"), torch.ones(8))
    assert torch.equal(source.read("q_proj.bias"), torch.zeros(8))
    drawn = source.read("a.weight")
    assert abs(drawn.std().item() - 0.2) < 0.003 and abs(drawn.mean().item()) < 0.004  # 5 and 3 standard errors
    assert not torch.equal(drawn, source.read("b.weight"))
    assert not torch.equal(drawn, SeededWeights(shapes, 0.2, seed=2).read("a.weight"))
    assert torch.equal(source.read("a.weight", 0, 7, 11), drawn[7:11])
    assert torch.equal(source.read("a.weight", 1, 7, 11), drawn[:, 7:11])
