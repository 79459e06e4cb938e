"""Folders that cannot be the model: one line that names the tensor and the file, and nothing is read."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nemo_jepo.actor.weights.hf_folder import INDEX, SafetensorsFolder
from nemo_jepo.actor.weights.load import SeededWeights, hf_shapes, open_source
from nemo_jepo.config.errors import ConfigError
from tests.support.hf_models import SHAPES, random_model, save

SHAPE = "qwen2 tied"
WHOLE = "model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    save(random_model(SHAPE), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def shards(tmp_path) -> Path:
    save(random_model(SHAPE), tmp_path / "model", shard_bytes=20_000)
    return tmp_path / "model"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    source = SafetensorsFolder(folder)
    return {name: source.read(name).clone() for name in hf_shapes(random_model(SHAPE).config)}


def fault_of(folder: Path, file: str) -> str:
    """What is said of a file, in one line."""
    with pytest.raises(ConfigError) as caught:
        open_source(random_model(SHAPE).config, str(folder), seed=0)
    before, _, fault = str(caught.value).partition(f"={str(folder / file)!r}: ")
    assert before == "pretrained_checkpoint.restore_from_path" and fault and "\n" not in fault
    return fault


def edit_index(folder: Path, **changes: str | None) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {k: v for k, v in (index["weight_map"] | changes).items() if v is not None}
    (folder / INDEX).write_text(json.dumps(index))


def test_a_whole_folder_opens_and_a_copy_of_the_tied_head_is_no_stranger(folder):
    whole = tensors(folder)
    copy, buffer = whole["model.embed_tokens.weight"].clone(), "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(whole | {"lm_head.weight": copy, buffer: torch.ones(8)}, folder / WHOLE)
    source = open_source(random_model(SHAPE).config, str(folder), seed=0)
    assert torch.equal(source.read("model.norm.weight"), random_model(SHAPE).model.norm.weight)


def test_slices_are_those_of_the_tensor_also_after_their_file_is_closed(shards):
    name = "model.layers.1.mlp.gate_proj.weight"
    expected = random_model(SHAPE).state_dict()[name]
    source = SafetensorsFolder(shards)
    rows, columns = source.read(name, 0, 5, 9), source.read(name, 1, 5, 9)
    assert torch.equal(rows, expected[5:9]) and torch.equal(columns, expected[:, 5:9])


def test_a_missing_tensor_is_named(folder):
    left = tensors(folder)
    del left["model.layers.2.self_attn.k_proj.bias"]
    save_file(left, folder / WHOLE)
    assert fault_of(folder, "").startswith("tensor model.layers.2.self_attn.k_proj.bias is missing. ")


def test_a_tensor_that_the_index_leaves_out_and_no_file_holds_is_named(shards):
    name = "model.layers.2.self_attn.k_proj.bias"
    file = json.loads((shards / INDEX).read_text())["weight_map"][name]
    source = SafetensorsFolder(shards)
    held = [n for n, f in json.loads((shards / INDEX).read_text())["weight_map"].items() if f == file and n != name]
    save_file({n: source.read(n).clone() for n in held}, shards / file)
    assert fault_of(shards, file).startswith(f"tensor {name} is missing. ")
    edit_index(shards, **{name: None})
    assert fault_of(shards, INDEX).startswith(f"tensor {name} is missing. ")


def test_a_wrong_shape_is_named_with_both_shapes(folder):
    save_file(tensors(folder) | {"model.norm.weight": torch.ones(33)}, folder / WHOLE)
    assert fault_of(folder, WHOLE).startswith("tensor model.norm.weight has shape (33,), config.json asks for (32,). ")


def test_a_tensor_of_another_architecture_is_named(folder):
    save_file(tensors(folder) | {"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}, folder / WHOLE)
    fault = fault_of(folder, WHOLE)
    assert fault.startswith("tensor model.layers.0.self_attn.q_norm.weight is not part of this architecture. ")


def test_quantised_weights_are_named(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    whole = tensors(folder)
    save_file(whole | {name: whole[name].to(torch.float8_e4m3fn)}, folder / WHOLE)
    assert fault_of(folder, WHOLE).startswith(f"tensor {name} has dtype F8_E4M3, which is not one of F32, BF16, F16. ")


def test_of_data_cut_short_the_first_lost_tensor_is_named(folder):
    file = folder / WHOLE
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = "model.layers.1.mlp.down_proj.weight"
    file.write_bytes(content[: 8 + length + header[name]["data_offsets"][1] - 1])
    assert fault_of(folder, WHOLE).startswith(f"tensor {name} is lost: the file cannot be read (")


@pytest.mark.parametrize("size", [0, 5, 100])
def test_of_a_header_cut_short_the_file_is_named(size, folder):
    file = folder / WHOLE
    file.write_bytes(file.read_bytes()[:size])
    assert fault_of(folder, WHOLE).startswith("cannot be read (")


def test_of_a_shard_with_its_header_cut_short_a_tensor_that_the_index_lists_is_named(shards):
    map_ = json.loads((shards / INDEX).read_text())["weight_map"]
    name, file = next(iter(map_.items()))
    (shards / file).write_bytes((shards / file).read_bytes()[:100])
    assert fault_of(shards, file).startswith(f"tensor {name} is lost: the file cannot be read (")


def test_a_shard_that_the_index_lists_and_nobody_copied_is_named(shards):
    file = sorted(shards.glob("*.safetensors"))[-1]
    file.unlink()
    assert re.match(r"tensor model\.\S+ is lost: the file is missing\. ", fault_of(shards, file.name))


@pytest.mark.parametrize("content", ["", '{"metadata": {}}', "[]", '{"weight_map": []}'])
def test_a_broken_index_is_named(content, folder):
    (folder / INDEX).write_text(content)
    assert fault_of(folder, INDEX).startswith("cannot be read (")


def test_shards_beside_the_index_that_it_does_not_list_are_not_read(shards):
    save_file({"stranger": torch.ones(1)}, shards / "consolidated.safetensors")
    open_source(random_model(SHAPE).config, str(shards), seed=0)


def test_a_folder_without_weights_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPES[SHAPE]))
    assert fault_of(tmp_path, "") == "holds no *.safetensors. Convert the weights."


def test_a_file_that_is_cut_while_others_are_read_is_named_with_its_tensor(folder):
    source = SafetensorsFolder(folder)
    (folder / WHOLE).write_bytes((folder / WHOLE).read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model\.safetensors'\: tensor model\.norm\.weight cannot be read"):
        source.read("model.norm.weight")


def test_a_seed_needs_no_folder():
    config = random_model(SHAPE).config
    source = open_source(config, None, seed=3)
    expected = SeededWeights(hf_shapes(config), config.initializer_range, seed=3)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(source.read(name), expected.read(name))


def with_header(file: Path, change) -> None:
    """The file, with what `change` makes of its header's text."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = change(content[8 : 8 + length])
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


NORM = "model.norm.weight"
LIES = {
    "offsets that overlap": {"data_offsets": [0, 128]},
    "offsets backwards": {"data_offsets": [128, 0]},
    "a shape of more bytes": {"shape": [33]},
    "a shape that overflows": {"shape": [2**40, 2**40]},
    "no such dtype": {"dtype": "F128"},
    "offsets of nothing": {"data_offsets": []},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_one_line(lie, folder):
    def change(text: bytes) -> bytes:
        header = json.loads(text)
        return json.dumps(header | {NORM: header[NORM] | LIES[lie]}).encode()

    with_header(folder / WHOLE, change)
    assert "cannot be read (" in fault_of(folder, WHOLE)


def test_a_name_that_stands_twice_in_a_header_is_named(folder):
    with_header(
        folder / WHOLE, lambda text: text.rstrip()[:-1] + b"," + json.dumps({NORM: json.loads(text)[NORM]}).encode()[1:]
    )
    assert fault_of(folder, WHOLE) == f"tensor {NORM} stands 2 times in the header. Copy the file again."


@pytest.mark.parametrize("length", [10**7, 2**31, 2**64 - 1])
def test_a_header_that_says_to_be_longer_than_the_file_is_not_read(length, folder):
    content = (folder / WHOLE).read_bytes()
    (folder / WHOLE).write_bytes(length.to_bytes(8, "little") + content[8:])
    assert fault_of(folder, WHOLE).startswith("cannot be read (")


@pytest.mark.parametrize("target", ["../outside.safetensors", "/outside.safetensors", "..", "."])
def test_an_index_that_leads_out_of_the_folder_is_refused(target, folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {NORM: target}}))
    with pytest.raises(ConfigError, match="lies outside of the folder|is a folder, and only a regular file is read"):
        SafetensorsFolder(folder)


def test_a_link_out_of_the_folder_and_a_fifo_are_refused(folder, tmp_path):
    (folder / WHOLE).rename(tmp_path / "elsewhere")
    (folder / WHOLE).symlink_to(tmp_path / "elsewhere")
    assert fault_of(folder, WHOLE).startswith(
        f"lies outside of the folder, at {tmp_path}/elsewhere. Put the file itself"
    )
    (folder / WHOLE).unlink()
    os.mkfifo(folder / WHOLE)
    assert fault_of(folder, WHOLE).startswith("is a FIFO, and only a regular file is read")
