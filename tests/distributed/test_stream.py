"""Hugging Face -> Megatron -> Hugging Face, bit for bit, in every layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from nemo_jepo.actor.weights.load import SeededWeights, hf_shapes
from tests.support.hf_models import SHAPES, on_disk, random_model, save
from tests.support.ranks import run_ranks

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
CASES = [
    (layout, shape)
    for layout in LAYOUTS
    for shape in SHAPES
    if "num_local_experts" in SHAPES[shape] or not layout.startswith("EP")
]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensors]:
    return {name: on_disk(random_model(name)) for name in SHAPES}


@pytest.fixture(scope="module")
def streams(tmp_path_factory) -> dict[tuple[str, str], Tensors]:
    """Streams by layout and shape; "seeded" starts from a seed instead of a folder."""
    root = tmp_path_factory.mktemp("streams")
    sources: dict[str, dict[str, object]] = {
        name: {"shape": shape, "folder": save(random_model(name), root / name), "seed": 0}
        for name, shape in SHAPES.items()
    }
    sources["seeded"] = {"shape": SHAPES["qwen2 untied"], "folder": None, "seed": 7}
    cases = [*CASES, *((layout, "seeded") for layout in LAYOUTS if not layout.startswith("EP"))]
    files = {case: str(root / f"{case}.st") for case in cases}
    for ranks in (2, 4):
        jobs = {
            files[layout, name]: sources[name] | {"model": LAYOUTS[layout][1]}
            for layout, name in cases
            if LAYOUTS[layout][0] == ranks
        }
        (root / "jobs.json").write_text(json.dumps(jobs))
        run_ranks(ranks, [str(Path(__file__).with_name("stream_worker.py")), str(root / "jobs.json")])
    return {case: in_order(file) for case, file in files.items()}


def in_order(file: str) -> Tensors:
    with safe_open(file, framework="pt") as tensors:
        return {name: tensors.get_tensor(name) for name in json.loads(tensors.metadata()["order"])}


@pytest.mark.parametrize(("layout", "shape"), CASES)
def test_the_stream_gives_back_the_folder_bit_for_bit(layout, shape, streams, expected):
    found = streams[layout, shape]
    assert set(found) == set(expected[shape]) and list(found) == list(hf_shapes(random_model(shape).config))
    for name in found:
        assert torch.equal(found[name], expected[shape][name]), name


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if not layout.startswith("EP")])
def test_a_seed_gives_the_same_model_in_every_layout(layout, streams):
    found = streams[layout, "seeded"]
    source = SeededWeights({name: tuple(tensor.shape) for name, tensor in found.items()}, 0.2, seed=7)
    for name, tensor in found.items():
        assert torch.equal(tensor, source.read(name)), name


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
