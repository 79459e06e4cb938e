"""`nemo-jepo checkpoint list` and `verify`: what is whole, what breaks the rest, in one line each and by exit code."""

import json
from pathlib import Path

import pytest

from nemo_jepo import cli
from nemo_jepo.checkpoint import format
from nemo_jepo.checkpoint.format import (
    broken_file,
    mark_complete,
    note_checksums,
    whole_checkpoints,
)


def write(folder: Path, step: int) -> Path:
    """A checkpoint as two ranks leave it; its tensors are a few bytes."""
    path = folder / f"step_{step:06d}"
    (path / "chat_templates").mkdir(parents=True)
    for rank in (0, 1):
        shard = path / f"__{rank}_0.distcp"
        shard.write_bytes(bytes(range(200)) * (rank + 1))
        note_checksums(path, rank, [shard])
    (path / "loop.json").write_text("{}")
    (path / "chat_templates" / "plain.jinja").write_text("{{ messages }}")
    mark_complete(path, step)
    return path


@pytest.fixture
def run_folder(tmp_path) -> Path:
    """Steps 2, 4 and 10."""
    for step in (2, 4, 10):
        write(tmp_path / "checkpoints", step)
    return tmp_path


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_the_marker_knows_every_file_and_the_ranks_notes_are_gone(run_folder):
    path = run_folder / "checkpoints" / "step_000004"
    marker = json.loads((path / "complete.json").read_text())
    names = {"__0_0.distcp", "__1_0.distcp", "loop.json", "chat_templates/plain.jinja"}
    assert marker["files"].keys() == marker["sha256"].keys() == names
    assert marker["files"]["__1_0.distcp"] == 400
    assert {file.name for file in path.iterdir()} == {*(name.split("/")[0] for name in names), "complete.json"}
    assert broken_file(path) is None


def test_list_says_of_each_step_whether_it_is_whole(run_folder, capsys):
    assert format.main(["list", str(run_folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["step_000002", "step_000004", "step_000010"]
    assert all(line.endswith("  whole") and "KiB" in line and "20" in line for line in lines)


def test_list_names_what_is_missing_and_what_is_unfinished(run_folder, capsys):
    checkpoints = run_folder / "checkpoints"
    (checkpoints / "step_000004" / "__1_0.distcp").unlink()
    (checkpoints / "step_000010" / "complete.json").unlink()
    (checkpoints / ".step_000012.0a1b2c3d.partial").mkdir()
    (checkpoints / "step_000004.bak").mkdir()
    assert format.main(["list", str(run_folder)]) == 1
    whole, missing, unmarked, unfinished = capsys.readouterr().out.splitlines()
    assert whole.startswith("step_000002") and whole.endswith("whole")
    assert missing.startswith("step_000004") and "__1_0.distcp is missing" in missing
    assert unmarked.startswith("step_000010") and "complete.json" in unmarked
    assert unfinished.startswith("step_000012") and "unfinished" in unfinished
    assert [path.name for path in whole_checkpoints(checkpoints)] == ["step_000002"]


def test_verify_reads_everything_again(run_folder, capsys):
    path = run_folder / "checkpoints" / "step_000004"
    assert format.main(["verify", str(path)]) == 0
    assert "whole, 4 files" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["__1_0.distcp", "loop.json", "chat_templates/plain.jinja"])
def test_verify_names_a_file_with_one_bit_changed_where_the_size_tells_nothing(name, run_folder, capsys):
    path = run_folder / "checkpoints" / "step_000004"
    flip_a_bit(path / name)
    assert format.main(["list", str(run_folder)]) == 0
    capsys.readouterr()
    assert format.main(["verify", str(path)]) == 1
    out = capsys.readouterr().out
    assert f"{name} holds other bytes than when it was written" in out and out.count("\n") == 1


def test_verify_names_a_missing_file(run_folder, capsys):
    path = run_folder / "checkpoints" / "step_000004"
    (path / "loop.json").unlink()
    assert format.main(["verify", str(path)]) == 1
    assert "loop.json is missing" in capsys.readouterr().out


def test_a_checkpoint_without_checksums_is_judged_by_its_sizes(run_folder, capsys):
    path = run_folder / "checkpoints" / "step_000004"
    marker = json.loads((path / "complete.json").read_text())
    del marker["sha256"]
    (path / "complete.json").write_text(json.dumps(marker))
    assert format.main(["verify", str(path)]) == 0
    assert "it has no checksums" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [[], ["list"], ["verify"], ["show", "x"], ["list", "a", "b"], ["list", "no/such/run"], ["verify", "no/such/step"]],
)
def test_a_wrong_command_line_is_exit_code_2_and_says_why(arguments, capsys):
    assert cli.main(["checkpoint", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and ("usage:" in captured.err or "no/such/" in captured.err)
