"""The folders that export writes: what transformers loads, whole or not at all."""

import hashlib
import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from nemo_jepo.actor.weights.checksums import CHECKSUMS, known_checksums
from nemo_jepo.actor.weights.hf_folder import SafetensorsFolder
from nemo_jepo.checkpoint.hf.export import export_hf
from tests.support import fork_server
from tests.support.hf_models import random_model, save

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def companions(tmp_path) -> Path:
    folder = tmp_path / "companions"
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "merges.txt", "chat_template.jinja"):
        (folder / name).write_text(f"{name}\n  as it was ")
    (folder / "common.pt").write_text("no companion")
    return folder


def shapes_of(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def numbered(count: int = 6) -> Tensors:
    return {f"layer.{i}.weight": torch.randn(30, 10, generator=torch.Generator().manual_seed(i)) for i in range(count)}


@pytest.mark.parametrize("shape, dtype", [("llama3 untied", torch.float32), ("qwen3 tied", torch.bfloat16)])
def test_transformers_loads_an_exported_folder_with_the_same_weights(shape, dtype, tmp_path):
    model = random_model(shape).to(dtype)
    save(model, tmp_path / "source")
    tied = model.config.tie_word_embeddings
    tensors = {k: v for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    folder = tmp_path / "model"
    export_hf(tensors.items(), shapes_of(tensors), dtype, folder, tmp_path / "source", shard_bytes=20_000)
    assert len(list(folder.glob("*.safetensors"))) > 3
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert loaded.config.to_dict()["rope_parameters"] == model.config.to_dict()["rope_parameters"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_shards_are_full_but_not_over_full_and_named_as_transformers_names_them(companions, tmp_path):
    tensors = numbered()  # 1200 bytes each
    export_hf(tensors.items(), shapes_of(tensors), torch.float32, tmp_path / "m", companions, shard_bytes=2400)
    files = sorted((tmp_path / "m").glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [len(safe_open(file, framework="pt").keys()) for file in files] == [2, 2, 2]
    source = SafetensorsFolder(tmp_path / "m")
    source.check(shapes_of(tensors))
    assert all(torch.equal(source.read(name), tensor) for name, tensor in tensors.items())


def test_what_travels_along_is_copied_byte_for_byte(companions, tmp_path):
    tensors = numbered(1)
    export_hf(tensors.items(), shapes_of(tensors), torch.float32, tmp_path / "m", companions)
    written = {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()}
    checksums = {name: hashlib.sha256(content).hexdigest() for name, content in written.items() if name != CHECKSUMS}
    assert json.loads(written.pop(CHECKSUMS)) == known_checksums(tmp_path / "m") == checksums
    assert written.pop("model.safetensors")
    assert written == {file.name: file.read_bytes() for file in companions.iterdir() if file.name != "common.pt"}


def test_an_export_that_dies_leaves_no_folder_and_the_next_one_is_whole(companions, tmp_path):
    tensors, folder = numbered(), tmp_path / "model"

    def dying() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(tensors.items())[:-1]
        assert not folder.exists() and any(tmp_path.rglob("*.safetensors"))
        raise KeyboardInterrupt

    arguments = (shapes_of(tensors), torch.float32, folder, companions)
    with pytest.raises(KeyboardInterrupt):
        export_hf(dying(), *arguments, shard_bytes=1200)
    assert {path.name for path in tmp_path.iterdir()} == {"companions"}
    export_hf(tensors.items(), *arguments)
    assert {file.name for file in folder.glob("*.safetensors")} == {"model.safetensors"}
    assert not (folder / "model.safetensors.index.json").exists()


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from nemo_jepo.checkpoint.hf.export import export_hf
from tests.distributed.test_export import numbered, shapes_of
tensors = numbered()
def stream():
    yield from list(tensors.items())[:4]
    os.kill(os.getpid(), signal.SIGKILL)
root = Path(sys.argv[1])
export_hf(stream(), shapes_of(tensors), torch.float32, root / "model", root / "companions", shard_bytes=1200)
"""

FULL = """
import resource, sys, torch
from pathlib import Path
from nemo_jepo.checkpoint.hf.export import export_hf
from tests.distributed.test_export import numbered, shapes_of
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
tensors, root = numbered(), Path(sys.argv[1])
export_hf(tensors.items(), shapes_of(tensors), torch.float32, root / "model", root / "companions")
"""


def run_program(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return fork_server.run(["-c", program, str(folder)])


def test_the_remains_of_a_killed_export_are_no_folder_and_do_not_stop_the_next(companions, tmp_path):
    assert run_program(KILLED, tmp_path).returncode == -signal.SIGKILL
    remains = tmp_path / ".model.partial"
    assert len(list(remains.glob("*.safetensors"))) >= 4 and not (tmp_path / "model").exists()
    with pytest.raises(ValueError, match=r"tensor layer\.4\.weight is lost"):
        SafetensorsFolder(remains).check(shapes_of(numbered()))
    tensors = numbered()
    export_hf(tensors.items(), shapes_of(tensors), torch.float32, tmp_path / "model", companions)
    assert not remains.exists()


def test_a_file_that_may_not_grow_is_named_with_the_tensor_that_did_not_fit(companions, tmp_path):
    """4000 bytes hold the header (about 500) and two tensors of 1200; the third does not fit."""
    failed = run_program(FULL, tmp_path)
    line = failed.stderr.strip().splitlines()[-1]
    assert "model.safetensors': tensor layer.2.weight cannot be written ([Errno 27] File too large)" in line
    assert {path.name for path in tmp_path.iterdir()} == {"companions"}


def test_an_export_never_writes_into_a_folder_that_exists(companions, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(FileExistsError, match="model exists"):
        export_hf([("a", torch.ones(1))], {"a": (1,)}, torch.float32, tmp_path / "model", companions)
    assert not list((tmp_path / "model").iterdir())
