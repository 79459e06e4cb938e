"""Folders that cannot be the model: one line that names the tensor or the file."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nemo_jepo.config import ConfigError
from nemo_jepo.weights.layout import GroupedQKV, Sliced
from nemo_jepo.weights.load import SafetensorsFolder, SeededWeights, hf_shapes, open_source
from tests.actor.hf_models import SHAPES, random_model, save

SHAPE = "qwen2 tied"


@pytest.fixture
def folder(tmp_path) -> Path:
    save(random_model(SHAPE), tmp_path / "model")
    return tmp_path / "model"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    source = SafetensorsFolder(folder)
    return {name: source.read(name).clone() for name in hf_shapes(random_model(SHAPE).config)}


def error_of(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        open_source(random_model(SHAPE).config, str(folder), seed=0)
    message = str(caught.value)
    assert message.startswith("pretrained_checkpoint.restore_from_path=") and "\n" not in message
    return message


@pytest.mark.parametrize("shape", SHAPES)
def test_names_and_shapes_are_those_of_transformers(shape):
    model = random_model(shape)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}  # a tied head once
    assert hf_shapes(model.config) == expected


def test_a_whole_folder_opens_and_a_copy_of_the_tied_head_is_no_stranger(folder):
    whole = tensors(folder)
    save_file(
        whole
        | {
            "lm_head.weight": whole["model.embed_tokens.weight"].clone(),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        },
        folder / "model.safetensors",
    )
    source = open_source(random_model(SHAPE).config, str(folder), seed=0)
    assert torch.equal(source.read("model.norm.weight"), random_model(SHAPE).model.norm.weight)


def test_a_missing_tensor_is_named(folder):
    left = tensors(folder)
    del left["model.layers.2.self_attn.k_proj.bias"]
    save_file(left, folder / "model.safetensors")
    assert "'model.layers.2.self_attn.k_proj.bias': is missing" in error_of(folder)


def test_a_wrong_shape_is_named_with_both_shapes(folder):
    wrong = tensors(folder) | {"model.norm.weight": torch.ones(33)}
    save_file(wrong, folder / "model.safetensors")
    assert "'model.norm.weight': has shape (33,), config.json asks for (32,)" in error_of(folder)


def test_a_tensor_of_another_architecture_is_named(folder):
    more = tensors(folder) | {"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}
    save_file(more, folder / "model.safetensors")
    assert "'model.layers.0.self_attn.q_norm.weight': is not part of this architecture" in error_of(folder)


def test_a_truncated_file_is_named(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert re.search(r"model\.safetensors': cannot be read", error_of(folder))


def test_a_shard_that_the_index_lists_and_nobody_copied_is_named(tmp_path):
    save(random_model(SHAPE), tmp_path, shard_bytes=20_000)
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    last.unlink()
    assert re.search(re.escape(last.name) + "': cannot be read", error_of(tmp_path))


@pytest.mark.parametrize("content", ["", '{"metadata": {}}', "[]"])
def test_a_broken_index_is_named(content, folder):
    (folder / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json': cannot be read" in error_of(folder)


def test_shards_beside_the_index_that_it_does_not_list_are_not_read(tmp_path):
    save(random_model(SHAPE), tmp_path, shard_bytes=20_000)
    save_file({"stranger": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    open_source(random_model(SHAPE).config, str(tmp_path), seed=0)


def test_a_folder_without_weights_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPES[SHAPE]))
    assert f"{str(tmp_path)!r}: holds no *.safetensors" in error_of(tmp_path)


# ---- layouts, by hand -----------------------------------------------------------------------------------------


class Named:
    """A source of given tensors."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self._tensors = tensors

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> torch.Tensor:
        tensor = self._tensors[name]
        return tensor if dim is None else tensor.narrow(dim, start, stop - start)


def test_query_key_value_lie_side_by_side_per_group():
    """4 query heads, 2 key/value heads, head size 1: group 0 is q0 q1 k0 v0, group 1 is q2 q3 k1 v1."""
    q, k, v = torch.tensor([[0.0], [1], [2], [3]]), torch.tensor([[10.0], [11]]), torch.tensor([[20.0], [21]])
    entry = GroupedQKV("", "w", num_heads=4, num_kv_heads=2, head_size=1, trailing=(1,))
    source = Named(**{"q_proj.w": q, "k_proj.w": k, "v_proj.w": v})
    assert entry.read_shard(source, 0, 1).flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    shards = [entry.read_shard(source, rank, 2) for rank in range(2)]
    assert [shard.flatten().tolist() for shard in shards] == [[0, 1, 10, 20], [2, 3, 11, 21]]
    joined = entry.join_shards(shards)
    assert all(torch.equal(joined[name], source.read(name)) for name in ("q_proj.w", "k_proj.w", "v_proj.w"))


def test_gate_and_up_are_sliced_apart():
    source = Named(gate=torch.tensor([[0.0], [1], [2], [3]]), up=torch.tensor([[10.0], [11], [12], [13]]))
    entry = Sliced(("gate", "up"), (4, 1), 0)
    assert [entry.read_shard(source, r, 2).flatten().tolist() for r in (0, 1)] == [[0, 1, 10, 11], [2, 3, 12, 13]]


def test_a_vocabulary_is_padded_with_zeros_that_never_leave():
    source = Named(table=torch.arange(1.0, 6.0)[:, None])
    entry = Sliced(("table",), (5, 1), 0)
    shards = [entry.read_shard(source, rank, 3) for rank in range(3)]
    assert [shard.flatten().tolist() for shard in shards] == [[1, 2], [3, 4], [5, 0]]
    assert torch.equal(entry.join_shards(shards)["table"], source.read("table"))


def test_a_seed_needs_no_folder():
    config = random_model(SHAPE).config
    source = open_source(config, None, seed=3)
    expected = SeededWeights(hf_shapes(config), config.initializer_range, seed=3)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(source.read(name), expected.read(name))
