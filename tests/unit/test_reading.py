"""Files of a user: what is wrong with one is a line that names it, and no file outside of a model's folder is read."""

import errno
import json
import os
from pathlib import Path

import pytest

from nemo_jepo.config.errors import ConfigError, DataError, one_line, shown
from nemo_jepo.config.reading import (
    held_stderr,
    library,
    line_of,
    read_json,
    require_inside,
    require_model_files,
    unusable,
)


def fault_of(path: Path, limit: int = 100) -> str:
    with pytest.raises(ConfigError) as caught:
        read_json("key", path, limit)
    before, _, fault = str(caught.value).partition(f"key={str(path)!r}: ")
    assert before == "" and fault
    return fault


# ---- one file

CONTENTS = {
    b"": "cannot be read (Expecting value: line 1 column 1 (char 0)). Copy the file again.",
    b"[1]": "cannot be read (it holds no JSON object). Copy the file again.",
    b'{"a": "\xff"}': "cannot be read ('utf-8' codec can't decode byte 0xff in position 7: invalid start byte). "
    "Copy the file again.",
    b"[" * 5000: "cannot be read (nested too deeply). Copy the file again.",
    b'{"a": ' + b"9" * 5000 + b"}": "cannot be read (Exceeds the limit (4300 digits) for integer string conversion",
    b" " * 10_001: "holds 10,001 bytes, and no such file has more than 10,000. Look at what it is.",
}


@pytest.mark.parametrize("content", CONTENTS)
def test_a_file_that_is_no_json_object_is_named(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    assert fault_of(tmp_path / "config.json", 10_000).startswith(CONTENTS[content])


def test_what_is_no_regular_file_is_neither_opened_nor_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    faults = {name: fault_of(tmp_path / name) for name in (".", "fifo", "zero", "none")}
    assert faults == {
        ".": "is a folder, and only a regular file is read. Put the file itself there.",
        "fifo": "is a FIFO, and only a regular file is read. Put the file itself there.",
        "zero": "is a device, and only a regular file is read. Put the file itself there.",
        "none": "cannot be read (No such file or directory). Give the path of a file that you may read.",
    }
    assert unusable("x" * 300) == ("cannot be read (File name too long)", "Give the path of a file that you may read")
    assert unusable("a\0b") == ("cannot be read (embedded null byte)", "Give the path of a file that you may read")


# ---- a model's folder


@pytest.fixture
def snapshot(tmp_path) -> Path:
    """A commit in the hub's cache, whose config is a link to a blob of it."""
    folder = tmp_path / "models--owner--name" / "snapshots" / "0123"
    (folder.parents[1] / "blobs").mkdir(parents=True)
    folder.mkdir(parents=True)
    (folder.parents[1] / "blobs" / "hash").write_text("{}")
    (folder / "config.json").symlink_to("../../blobs/hash")
    return folder


def test_links_of_the_hubs_cache_and_inside_of_the_folder_are_followed(snapshot, tmp_path):
    (snapshot / "tokenizer.json").symlink_to("config.json")
    require_model_files("key", snapshot)
    (tmp_path / "mine").symlink_to(snapshot)
    require_model_files("key", tmp_path / "mine")


@pytest.mark.parametrize("target", ["../../../outside", "../../../models--other--name/blobs/hash", "/etc/hostname"])
def test_a_link_out_of_the_folder_is_refused_with_where_it_leads(target, snapshot, tmp_path):
    (snapshot / "vocab.json").symlink_to(target)
    with pytest.raises(ConfigError) as caught:
        require_model_files("key", snapshot)
    there = (snapshot / target).resolve()
    rule = f"lies outside of the folder, at {there}. Put the file itself into the folder."
    assert str(caught.value) == f"key={str(snapshot / 'vocab.json')!r}: {rule}"


def test_the_parent_and_a_link_to_itself_are_refused(snapshot):
    with pytest.raises(ConfigError, match="lies outside of the folder"):
        require_inside("key", snapshot, snapshot / ".." / "x")
    (snapshot / "loop").symlink_to("loop")
    with pytest.raises(ConfigError, match="cannot be read .*Put the file itself there"):
        require_inside("key", snapshot, snapshot / "loop")


def test_a_tokenizer_of_a_size_that_none_has_is_refused_and_weights_have_any(snapshot):
    for name in ("model.safetensors", "tokenizer.json"):
        (snapshot / name).touch()
        os.truncate(snapshot / name, 2**30)
    with pytest.raises(ConfigError, match="tokenizer.json': holds 1,073,741,824 bytes, and no such file has more than"):
        require_model_files("key", snapshot)


# ---- libraries


class PanicException(BaseException):
    """As Rust's: no Exception."""


@pytest.mark.parametrize(
    "error", [Exception("a\nb"), RecursionError(), MemoryError(), KeyError("b"), PanicException("b")]
)
def test_what_a_library_raises_is_one_line_with_its_last_one(error):
    with pytest.raises(ConfigError) as caught, library("key", "file", "is refused", "Do that"):
        raise error
    said = {"RecursionError": "nested too deeply", "MemoryError": "it needs more memory than there is"}
    said["KeyError"] = "KeyError 'b'"
    expected = said.get(type(error).__name__, "b")
    assert str(caught.value) == f"key='file': is refused ({expected}). Do that."


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(3), GeneratorExit(), DataError("own"), BrokenPipeError()]
)
def test_what_is_no_fault_of_a_file_passes(error):
    with pytest.raises(type(error)) as caught, library("key", "file", "is refused", "Do that"):
        raise error
    assert caught.value is error


def test_what_is_written_to_stderr_meanwhile_appears_behind_the_block_unless_rust_has_panicked(capfd):
    with held_stderr():
        os.write(2, b"a warning")
        assert capfd.readouterr().err == ""
    assert capfd.readouterr().err == "a warning"
    with pytest.raises(PanicException), held_stderr():
        os.write(2, b"thread panicked")
        raise PanicException("b")
    assert capfd.readouterr().err == ""


# ---- the system's errors


def test_room_is_asked_for_where_a_disk_is_full_and_never_where_something_cannot_be_read():
    def line(number: int, file: str | None = "/a/b") -> str:
        return line_of(OSError(number, os.strerror(number), file))

    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        assert line(number) == (
            f"/a/b: cannot be written ({os.strerror(number)}), in nemo_jepo. Make room there, or give another place."
        )
    assert line(errno.EROFS).startswith("/a/b: cannot be written (Read-only file system)")
    for number in (errno.EACCES, errno.ENOENT, errno.EIO, errno.EISDIR, errno.ENAMETOOLONG, errno.EMFILE):
        assert line(number).startswith("/a/b: cannot be read or written (") and "room" not in line(number)
    assert line(errno.ECONNREFUSED, None).startswith("the system: cannot be reached (Connection refused)")
    assert line_of(MemoryError()).startswith("the system: the memory of this machine is used up, in nemo_jepo.")


def test_a_message_is_one_printable_line_of_bounded_length():
    deep: list = []
    for _ in range(10_000):
        deep = [deep]
    assert shown(deep) == "a list that cannot be written out" and shown(10**5000) == "a int that cannot be written out"
    assert one_line("a\nb\0\ud800\u2028") == "a\\nb\\x00\\ud800\\u2028"
    line = str(ConfigError("k" * 10**5, "v" * 10**5, "r" * 10**5, "f"))
    assert len(line) < 2000 and line.startswith("kkk") and line.endswith("f.")
    assert json.loads(json.dumps(str(DataError("a\r\nb")))) == "a\\r\\nb"
