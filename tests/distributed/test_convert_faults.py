"""What import and export say when they cannot, and what they leave behind when they are stopped in the middle."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemo_jepo import cli
from nemo_jepo.actor.weights.checksums import CHECKSUMS
from nemo_jepo.checkpoint.format import require_whole
from nemo_jepo.checkpoint.hf.export import export_hf
from nemo_jepo.config.errors import ConfigError
from tests.support import fork_server
from tests.support.hf_models import random_model, save

pytestmark = pytest.mark.timeout(900)

SHAPE = "llama tied"


@pytest.fixture
def source(tmp_path) -> Path:
    return Path(save(random_model(SHAPE), tmp_path / "source"))


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


FAULTS = {
    "another architecture": (lambda f: edit_config(f, model_type="gpt2"), ["config.json", "'gpt2'", "qwen3_moe"]),
    "an unknown one": (lambda f: edit_config(f, model_type="new_one"), ["config.json", "'new_one'", "qwen3_moe"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json", "No such file"]),
    "a broken config": (lambda f: (f / "config.json").write_text("{"), ["config.json", "cannot be read"]),
    "a config that contradicts itself": (lambda f: edit_config(f, layer_types=["full_attention"]), ["config.json"]),
    "one layer too many": (lambda f: edit_config(f, num_hidden_layers=5), ["tensor model.layers.4.", "is missing"]),
    "one layer too few": (
        lambda f: edit_config(f, num_hidden_layers=3),
        ["model.safetensors", "tensor model.layers.3.", "not part"],
    ),
    "another width": (
        lambda f: edit_config(f, intermediate_size=40),
        ["model.safetensors", "tensor model.layers.0.mlp.gate_proj.weight has shape (48, 32)", "(40, 32)"],
    ),
    "a file cut short": (cut, ["model.safetensors", "tensor model.norm.weight is lost"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["holds no *.safetensors"]),
}


def fault_of(monkeypatch, capsys, *arguments: object) -> str:
    """The one line on stderr of a command that ends with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["nemo-jepo", *map(str, arguments)])
    assert cli.main() == 2
    out, err = capsys.readouterr()
    (line,) = err.strip().splitlines()
    assert not out
    return line


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_cannot_be_the_model_is_one_line(fault, source, tmp_path, monkeypatch, capsys):
    spoil, words = FAULTS[fault]
    spoil(source)
    before = set(tmp_path.iterdir())
    line = fault_of(monkeypatch, capsys, "import", source, tmp_path / "checkpoint")
    assert all(word in line for word in words), line
    assert set(tmp_path.iterdir()) == before


def test_a_wrong_command_line_is_one_line(source, tmp_path, monkeypatch, capsys):
    def line(*arguments: object) -> str:
        return fault_of(monkeypatch, capsys, *arguments)

    target = tmp_path / "checkpoint"
    assert "must divide the 1 trainer ranks" in line("import", source, target, "model.tensor_model_parallel_size=2")
    assert "model.* and checkpoint.* settings only" in line("import", source, target, "trainer.devices=2")
    assert "model.tensor_parallel" in line("import", source, target, "model.tensor_parallel=2")
    assert "exists" in line("import", source, tmp_path)
    assert "never finished" in line("export", source, tmp_path / "back")
    assert "a run's later step" in line("import", source, tmp_path / "step_000100")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def exported(source: Path, folder: Path) -> Path:
    """The model as export writes it."""
    tensors = load_file(source / "model.safetensors")
    export_hf(tensors.items(), {name: tuple(t.shape) for name, t in tensors.items()}, torch.float32, folder, source)
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_an_export_with_a_changed_bit_is_not_imported(name, source, tmp_path, monkeypatch, capsys):
    folder = exported(source, tmp_path / "exported")
    if name == "config.json":
        edit_config(folder, rope_theta=20000.0)
    else:
        flip_a_bit(folder / name)
    line = fault_of(monkeypatch, capsys, "import", folder, tmp_path / "checkpoint")
    assert f"{folder / name}': holds other bytes than when it was written (sha256). Copy the file again; if you" in line
    assert not (tmp_path / "checkpoint").exists()
    monkeypatch.setattr(sys, "argv", ["nemo-jepo", "import", *map(str, (folder, tmp_path / "checkpoint"))])
    monkeypatch.setattr(sys, "argv", [*sys.argv, "checkpoint.verify_on_load=none"])
    assert cli.main() == 0


def test_a_file_of_the_hubs_cache_has_the_checksum_of_its_name(source, tmp_path, monkeypatch, capsys):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in source.iterdir():
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(blob)
        (snapshot / file.name).symlink_to(blob)
    flip_a_bit((snapshot / "model.safetensors").resolve())
    line = fault_of(monkeypatch, capsys, "import", snapshot, tmp_path / "checkpoint")
    assert f"{snapshot / 'model.safetensors'}': holds other bytes" in line


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"../x": "00"}', '{"model.safetensors": 3}', "[" * 5000])
def test_a_list_of_checksums_that_is_none_is_one_line(text, source, tmp_path, monkeypatch, capsys):
    (source / CHECKSUMS).write_text(text)
    line = fault_of(monkeypatch, capsys, "import", source, tmp_path / "checkpoint")
    assert f"{source / CHECKSUMS}': cannot be read (" in line


def test_a_target_inside_a_file_is_one_line(source, tmp_path):
    """Found when the first byte is to be written; permissions are no test where root runs them."""
    with pytest.raises(ConfigError, match=r"^HF_DIR='.*weights/back': cannot be written .*Not a directory"):
        (tmp_path / "weights").touch()
        export_hf(iter(()), {}, torch.float32, tmp_path / "weights" / "back", source)


KILLED = """
import os, signal, sys
import nemo_jepo.checkpoint.convert, nemo_jepo.checkpoint.hf.torch_dist as torch_dist
from nemo_jepo import cli
def dying(original, count):
    def call(*arguments):
        nonlocal count
        count -= 1
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)
    return call
def dying_stream(*arguments, original=nemo_jepo.checkpoint.convert.weight_stream):
    yield from list(original(*arguments))[:20]
    os.kill(os.getpid(), signal.SIGKILL)
torch_dist._write_item = dying(torch_dist._write_item, 20)
nemo_jepo.checkpoint.convert.weight_stream = dying_stream
sys.argv = ["nemo-jepo", *sys.argv[1:]]
cli.main()
"""

# First where no file may grow beyond 60 kB, which tells of a full disk as a full disk does; then again without limit.
FULL_THEN_NOT = """
import resource, sys
from nemo_jepo import cli
sys.argv = ["nemo-jepo", *sys.argv[1:]]
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, most))
assert cli.main() == 2
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
assert cli.main() == 0
"""


def run_program(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    return fork_server.run(["-c", program, *map(str, arguments)], environment=environment)


def test_killed_on_a_full_disk_and_repeated_a_conversion_is_whole_in_the_end(source, tmp_path):
    checkpoint, back = tmp_path / "checkpoint", tmp_path / "back"
    files = {"import": (source, checkpoint, "__0_0.distcp"), "export": (checkpoint, back, "model.safetensors")}
    for command, (given, target, file) in files.items():
        before = set(tmp_path.iterdir())
        assert run_program(KILLED, command, given, target).returncode == -signal.SIGKILL
        (remains,) = set(tmp_path.iterdir()) - before
        assert any(remains.rglob(file)) and not target.exists()
        for folder in (remains, *remains.rglob("*")):
            with pytest.raises(ConfigError, match="never finished"):
                require_whole(folder)

        done = run_program(FULL_THEN_NOT, command, given, target)
        assert done.returncode == 0, done.stderr
        (line,) = done.stderr.strip().splitlines()
        assert file in line and "tensor " in line and "cannot be written ([Errno 27] File too large)" in line
        assert set(tmp_path.iterdir()) - before == {target}
    expected = load_file(source / "model.safetensors")
    found = load_file(back / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
