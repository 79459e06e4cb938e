"""`make smollm2`: a folder appears when the file is the one that is expected and the model answers."""

import importlib.util
import zipfile
from pathlib import Path

import pytest
from transformers.utils import logging

from nemo_jepo.utils.files import sha256_of
from tests.support.gguf_files import write_gguf
from tests.support.serving import tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tool(monkeypatch):
    spec = importlib.util.spec_from_file_location("smollm2", ROOT / "tools" / "smollm2.py")
    smollm2 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(smollm2)
    verbosity = logging.get_verbosity()
    yield smollm2
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture
def wheels(tool, tmp_path, monkeypatch) -> Path:
    """A folder with a wheel that holds a tiny model."""
    write_gguf(tiny_model(tmp_path / "source", "llama", tied=True, seed=6), tmp_path / "model.gguf")
    monkeypatch.setattr(tool, "SHA256", sha256_of(tmp_path / "model.gguf"))
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "some.whl", "w") as archive:
        archive.write(tmp_path / "model.gguf", tool.MEMBER)
    return tmp_path / "wheels"


def test_a_folder_appears_after_an_answer_and_is_asked_again(tool, wheels, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, "EXPECTED", "")
    folder = tmp_path / "models" / "tiny"
    folder.parent.mkdir()
    tool.main(folder, wheels)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{folder}: 0.1M parameters. What is the capital of France?")
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    tool.main(folder, tmp_path / "no wheels")
    assert capsys.readouterr().out.splitlines() == [line]
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_another_file_and_another_answer_are_refused(tool, wheels, tmp_path, monkeypatch):
    folder = tmp_path / "tiny"
    with pytest.raises(SystemExit, match="to 'What is the capital of France.', without Paris"):
        tool.main(folder, wheels)
    assert not folder.exists()
    monkeypatch.setattr(tool, "SHA256", "0" * 64)
    with pytest.raises(SystemExit, match=f"has the SHA-256 .*, not {'0' * 64}"):
        tool.main(folder, wheels)
    assert not folder.exists()
