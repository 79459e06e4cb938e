"""`nemo-jepo checkpoint list` and `verify`: what is whole, what breaks the rest, in one line each and by exit code."""

import errno
import json
import re
from pathlib import Path

import pytest

from nemo_jepo import cli
from nemo_jepo.checkpoint import command, format
from nemo_jepo.checkpoint.format import (
    NEEDED,
    broken_file,
    fault_of,
    latest_checkpoint,
    mark_complete,
    note_checksums,
    passed_over,
    remove,
    sweep,
    whole_checkpoints,
)
from nemo_jepo.config.errors import ConfigError


def write(folder: Path, step: int) -> Path:
    """A checkpoint as two ranks leave it; its tensors are a few bytes."""
    path = folder / f"step_{step:06d}"
    (path / "chat_templates").mkdir(parents=True)
    for rank in (0, 1):
        shard = path / f"__{rank}_0.distcp"
        shard.write_bytes(bytes(range(200)) * (rank + 1))
        note_checksums(path, rank, [shard])
    for name in NEEDED:
        (path / name).write_text("{}")
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
    names = {"__0_0.distcp", "__1_0.distcp", "chat_templates/plain.jinja", *NEEDED}
    assert marker["files"].keys() == marker["sha256"].keys() == names
    assert marker["files"]["__1_0.distcp"] == 400
    assert {file.name for file in path.iterdir()} == {*(name.split("/")[0] for name in names), "complete.json"}
    assert broken_file(path) is None


def test_list_says_of_each_step_whether_it_is_whole(run_folder, capsys):
    assert command.main(["list", str(run_folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["step_000002", "step_000004", "step_000010"]
    assert all(line.endswith("  whole") and "KiB" in line and "20" in line for line in lines)


def test_list_names_what_is_missing_and_what_is_unfinished(run_folder, capsys):
    checkpoints = run_folder / "checkpoints"
    (checkpoints / "step_000004" / "__1_0.distcp").unlink()
    (checkpoints / "step_000010" / "complete.json").unlink()
    (checkpoints / ".step_000012.0a1b2c3d.partial").mkdir()
    (checkpoints / ".step_000001.0a1b2c3d.deleted").mkdir()
    (checkpoints / "step_000004.bak").mkdir()
    assert command.main(["list", str(run_folder)]) == 1
    whole, missing, unmarked, deleted, unfinished = capsys.readouterr().out.splitlines()
    assert whole.startswith("step_000002") and whole.endswith("whole")
    assert missing.startswith("step_000004") and "__1_0.distcp is missing" in missing
    assert unmarked.startswith("step_000010") and "complete.json" in unmarked
    assert unfinished.startswith("step_000012") and "unfinished" in unfinished
    assert deleted.startswith("step_000001") and "half deleted" in deleted
    assert [path.name for path in whole_checkpoints(checkpoints)] == ["step_000002"]


def test_verify_reads_everything_again(run_folder, capsys):
    path = run_folder / "checkpoints" / "step_000004"
    assert command.main(["verify", str(path)]) == 0
    assert "whole, 7 files" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["__1_0.distcp", "loop.json", "chat_templates/plain.jinja"])
def test_verify_names_a_file_with_one_bit_changed_where_the_size_tells_nothing(name, run_folder, capsys):
    path = run_folder / "checkpoints" / "step_000004"
    flip_a_bit(path / name)
    assert command.main(["list", str(run_folder)]) == 0
    capsys.readouterr()
    assert command.main(["verify", str(path)]) == 1
    out = capsys.readouterr().out
    assert f"{name} holds other bytes than when it was written" in out and out.count("\n") == 1


def test_verify_names_a_missing_file(run_folder, capsys):
    path = run_folder / "checkpoints" / "step_000004"
    (path / "loop.json").unlink()
    assert command.main(["verify", str(path)]) == 1
    assert "loop.json is missing" in capsys.readouterr().out


def test_a_checkpoint_without_checksums_is_judged_by_its_sizes(run_folder, capsys):
    path = run_folder / "checkpoints" / "step_000004"
    marker = json.loads((path / "complete.json").read_text())
    del marker["sha256"]
    (path / "complete.json").write_text(json.dumps(marker))
    assert command.main(["verify", str(path)]) == 0
    assert "it has no checksums" in capsys.readouterr().out


# ---- what is no whole checkpoint ------------------------------------------------------------------------------


def edited(path: Path, **changes: object) -> Path:
    """The checkpoint with another marker; a change to None takes the key out."""
    marker = json.loads((path / "complete.json").read_text()) | changes
    (path / "complete.json").write_text(json.dumps({key: value for key, value in marker.items() if value is not None}))
    return path


def without(path: Path, name: str) -> dict[str, object]:
    """The marker's tables without one file."""
    marker = json.loads((path / "complete.json").read_text())
    return {key: {file: held for file, held in marker[key].items() if file != name} for key in ("files", "sha256")}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"files": {}, "sha256": {}}, "without .metadata"),
        ({"files": None}, "other keys than step, files and sha256"),
        ({"sha257": {}}, "other keys than step, files and sha256"),
        ({"sha256": {}}, "checksums of other files than it lists"),
        ({"files": {"../../etc/passwd": 1}}, "'../../etc/passwd' is outside of the folder"),
        ({"files": {"/etc/passwd": 1}}, "'/etc/passwd' is outside of the folder"),
        ({"files": {"loop.json": "2"}}, "files are not names with their sizes"),
        ({"files": ["loop.json"]}, "files are not names with their sizes"),
        ({"step": 5}, "of step 5"),
        ({"step": "4"}, "step is no number of steps"),
        ({"step": True}, "step is no number of steps"),
    ],
)
def test_a_marker_that_says_something_else_is_none(changes, fault, run_folder):
    path = edited(run_folder / "checkpoints" / "step_000004", **changes)
    assert fault_of(path) == f"has no readable complete.json ({fault})"


@pytest.mark.parametrize("name", NEEDED)
def test_a_checkpoint_without_what_every_load_reads_is_not_whole(name, run_folder):
    path = run_folder / "checkpoints" / "step_000004"
    edited(path, **without(path, name))
    assert fault_of(path) == f"has no readable complete.json (without {name})"


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"step": ' + b"9" * 5000])
def test_a_marker_that_is_not_ours_is_a_fault_and_no_traceback(text, run_folder):
    path = run_folder / "checkpoints" / "step_000004"
    (path / "complete.json").write_bytes(text)
    assert fault_of(path).startswith("has no readable complete.json (")


def test_a_run_whose_checkpoints_are_all_broken_does_not_begin_anew(run_folder):
    checkpoints = run_folder / "checkpoints"
    (checkpoints / "step_000002" / "complete.json").unlink()
    (checkpoints / "step_000004" / "__1_0.distcp").unlink()
    (checkpoints / "step_000010" / "complete.json").write_text('{"files": {}}')
    with pytest.raises(ConfigError) as caught:
        latest_checkpoint(checkpoints)
    assert str(caught.value) == (
        f"checkpoints='{checkpoints}': none is whole: "
        "step_000010 has no readable complete.json (other keys than step, files and sha256); "
        "step_000004 __1_0.distcp is missing or has another size than when it was written; "
        "step_000002 has no complete.json: it was never finished. "
        "Put back what is missing, or move that folder away to begin at step 0."
    )


def test_a_newer_broken_checkpoint_is_passed_over_and_named(run_folder):
    checkpoints = run_folder / "checkpoints"
    assert passed_over(checkpoints) == []
    (checkpoints / "step_000010" / "complete.json").unlink()
    (checkpoints / "step_000002" / "complete.json").unlink()
    assert latest_checkpoint(checkpoints) == checkpoints / "step_000004"
    newer = checkpoints / "step_000010"
    why = "has no complete.json: it was never finished"
    assert passed_over(checkpoints) == [f"{newer} is passed over, although it is the newer one: {why}"]


def test_a_run_without_checkpoints_begins(tmp_path):
    assert latest_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / ".step_000001.0a1b2c3d.partial").mkdir()
    assert latest_checkpoint(tmp_path) is None


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(format, "RETRIES_S", (0.0, 0.0, 0.0))


class FaultyDisk:
    """A disk that fails so many times to read a marker."""

    def __init__(self, monkeypatch, times: int) -> None:
        self.times, self.read = times, Path.read_bytes
        monkeypatch.setattr(Path, "read_bytes", lambda path: self.read_bytes(path))

    def read_bytes(self, path: Path) -> bytes:
        if path.name == "complete.json" and self.times:
            self.times -= 1
            raise OSError(errno.EIO, "Input/output error")
        return self.read(path)


def test_a_disk_with_a_moment_is_asked_again(run_folder, monkeypatch, no_pauses):
    FaultyDisk(monkeypatch, 2)
    assert latest_checkpoint(run_folder / "checkpoints").name == "step_000010"


def test_a_disk_that_does_not_read_is_an_error_and_no_older_checkpoint(run_folder, monkeypatch, no_pauses, capsys):
    FaultyDisk(monkeypatch, -1)
    with pytest.raises(ConfigError, match=r"complete.json': cannot be read \(Input/output error\), after 4 attempts"):
        latest_checkpoint(run_folder / "checkpoints")
    assert command.main(["list", str(run_folder)]) == 1
    assert capsys.readouterr().out.count("cannot be read (Input/output error)") == 3


# ---- how one goes ---------------------------------------------------------------------------------------------


def test_what_is_half_deleted_has_no_checkpoints_name(run_folder, monkeypatch):
    checkpoints = run_folder / "checkpoints"

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(format.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove(checkpoints / "step_000010")
    assert latest_checkpoint(checkpoints).name == "step_000004" and passed_over(checkpoints) == []
    (checkpoints / ".step_000012.0a1b2c3d.partial").mkdir()
    assert [re.sub(r"[0-9a-f]{8}", "*", path.name) for path in sweep(checkpoints)] == [
        ".step_000010.*.deleted",
        ".step_000012.*.partial",
    ]
    assert sweep(checkpoints) == [] and len(whole_checkpoints(checkpoints)) == 2


# ---- the command line -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [[], ["list"], ["verify"], ["show", "x"], ["list", "a", "b"], ["list", "no/such/run"], ["verify", "no/such/step"]],
)
def test_a_wrong_command_line_is_exit_code_2_and_says_why(arguments, capsys):
    assert cli.main(["checkpoint", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and ("usage:" in captured.err or "no/such/" in captured.err)
