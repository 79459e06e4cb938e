"""Hugging Face -> checkpoint -> Hugging Face, bit for bit: in every layout, from any layout in any other."""

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from nemo_jepo.actor.weights.checksums import CHECKSUMS, known_checksums
from nemo_jepo.utils.files import sha256_of
from tests.distributed.convert_jobs import exported, imported, imported_by_name
from tests.support.command_line import TINY
from tests.support.gguf_files import write_gguf
from tests.support.hf_models import SHAPES, random_model
from tests.support.rank_pool import on_ranks
from tests.support.ranks import run_ranks
from tests.support.serving import logprobs, tiny_model
from tests.support.small_tokenizers import small_tokenizer

pytestmark = pytest.mark.timeout(900)

SP = "model.sequence_parallel=true"
TP2, PP2 = ["model.tensor_model_parallel_size=2", SP], ["model.pipeline_model_parallel_size=2"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "TP2xPP2": (4, TP2 + PP2),
    "TP2": (2, TP2),
    "PP2": (2, PP2),
    "EP2": (2, ["model.expert_model_parallel_size=2"]),
    "one process": (1, []),
}
WAYS = {  # imported in, exported in
    "TP2xPP2": ["TP2xPP2", "one process"],
    "TP2": ["PP2", "one process"],
    "PP2": ["TP2"],
    "EP2": ["EP2", "one process"],
    "one process": ["one process"],
}
MODELS = {  # every kind of weight, head and number; the other shapes differ in numbers only
    "llama3 untied": torch.float32,
    "qwen2 tied": torch.float32,
    "qwen3 tied": torch.float32,
    "qwen3 untied": torch.float32,
    "qwen3_moe tied": torch.float32,
    "mixtral untied": torch.float32,
    "llama tied": torch.bfloat16,
    "llama untied": torch.float16,
}
CASES = [
    (model, written, read)
    for written, reads in WAYS.items()
    for read in reads
    for model in MODELS
    if "num_local_experts" in SHAPES[model] or "EP2" not in (written, read)
]


def name_of(*parts: str) -> str:
    return "-".join(parts).replace(" ", "_")


def write_model(name: str, folder: Path) -> None:
    """In several files, with everything beside the weights that a real folder has."""
    model = random_model(name).to(MODELS[name])
    model.save_pretrained(folder, max_shard_size=60_000)
    small_tokenizer("byte_level").save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}\n")
    assert len(list(folder.glob("*.safetensors"))) > 1 and (folder / "generation_config.json").exists()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("convert")


@functools.cache
def source_of(root: Path, name: str) -> Path:
    folder = root / name_of(name)
    write_model(name, folder)
    return folder


@functools.cache
def checkpoint_of(root: Path, name: str, written: str) -> Path:
    world_size, overrides = LAYOUTS[written]
    on_ranks(world_size, imported, source_of(root, name), checkpoint := root / name_of(name, written), overrides)
    return checkpoint


@functools.cache
def exported_of(root: Path, name: str, written: str, read: str) -> Path:
    world_size, overrides = LAYOUTS[read]
    back = root / name_of(name, written, read)
    on_ranks(world_size, exported, checkpoint_of(root, name, written), back, overrides)
    return back


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(("model", "written", "read"), CASES)
def test_an_exported_folder_is_the_imported_one_bit_for_bit(model, written, read, root):
    source, back = source_of(root, model), exported_of(root, model, written, read)
    expected, found = tensors(source), tensors(back)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype == MODELS[model]
        assert torch.equal(found[name], tensor), name
    beside = {file.name: file.read_bytes() for file in source.iterdir() if "safetensors" not in file.name}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= set(beside)
    others = (file for file in back.iterdir() if "safetensors" not in file.name and file.name != CHECKSUMS)
    assert {file.name: file.read_bytes() for file in others} == beside
    assert known_checksums(back) == {file.name: sha256_of(file) for file in back.iterdir() if file.name != CHECKSUMS}


def test_a_model_is_imported_by_its_name_which_the_first_rank_looks_up(root):
    source = source_of(root, "llama3 untied")
    assert on_ranks(2, imported_by_name, source, root / "by_name") == [1, 0]
    on_ranks(1, exported, root / "by_name", root / "by_name_back", [])
    found, expected = tensors(root / "by_name_back"), tensors(source)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_gguf_file_is_imported_by_two_ranks_and_leaves_nothing_beside_the_checkpoint(root):
    write_gguf(random_model("llama tied"), root / "tied.gguf")
    on_ranks(2, imported, root / "tied.gguf", root / "from_gguf", TP2)
    on_ranks(1, exported, root / "from_gguf", root / "from_gguf_back", [])
    found, expected = tensors(root / "from_gguf_back"), random_model("llama tied").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert not list(root.glob(".*"))


def test_every_layout_imports_and_exports():
    assert {written for _, written, _ in CASES} == {read for *_, read in CASES} == set(LAYOUTS)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same_with_the_exported_folder(name, root):
    read = [source_of(root, name), exported_of(root, name, "TP2xPP2", "one process")]
    source, back = (AutoModelForCausalLM.from_pretrained(folder, dtype=MODELS[name]) for folder in read)
    ids = torch.randint(101, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(back(ids).logits, source(ids).logits)


# ---- what the folders and checkpoints are for ----------------------------------------------------------------------

TRAIN = [setting for setting in TINY if not setting.startswith(("model.hf_config", "tokenizer."))]
TRAIN += ["trainer.jepo.max_steps=1", "trainer.jepo.save_interval=0", "trainer.jepo.val_check_interval=0"]


@pytest.fixture(scope="module")
def imported_model(tmp_path_factory) -> tuple[PreTrainedModel, Path]:
    """A model and its checkpoint, made through the command line."""
    folder = tmp_path_factory.mktemp("imported")
    model = tiny_model(folder / "source", "qwen3", tied=True, seed=3)
    run_ranks(1, ["-m", "nemo_jepo.cli", "import", str(folder / "source"), str(folder / "checkpoint")])
    return model, folder / "checkpoint"


@pytest.mark.parametrize("layout", [[], ["trainer.devices=2", *TP2]], ids=["one process", "TP2"])
def test_a_run_starts_from_an_imported_checkpoint(layout, imported_model, tmp_path):
    model, checkpoint = imported_model
    start = ["model.hf_config=null", f"pretrained_checkpoint.restore_from_path={checkpoint}"]
    where = [f"exp_manager.exp_dir={tmp_path}", "exp_manager.name=run"]
    command = ["-m", "nemo_jepo.cli", "train", *TRAIN, *start, *where, *layout]
    run_ranks(2 if layout else 1, command, timeout=400)
    (line,) = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert line["step"] == 1
    rollouts = (tmp_path / "run" / "rollouts" / "step_000001.jsonl").read_text().splitlines()
    for rollout in map(json.loads, rollouts):  # scored before the first update
        prompt, scored = (tuple(rollout["token_ids"][part]) for part in parts(rollout["prompt_length"]))
        expected = logprobs(model, prompt, scored)
        torch.testing.assert_close(torch.tensor(rollout["policy_logprobs"]), expected, rtol=0, atol=1e-4)


def parts(length: int) -> tuple[slice, slice]:
    return slice(length), slice(length, None)
