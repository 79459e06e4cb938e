"""Temporary files of a server: in a folder of its own, which is gone after it, however it ended."""

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_jepo.utils import processes
from nemo_jepo.utils.processes import private_folder


@pytest.fixture
def place(monkeypatch) -> Iterator[Path]:
    """The folder for temporary files; its path is short."""
    with tempfile.TemporaryDirectory() as short:
        monkeypatch.setattr(tempfile, "tempdir", short)
        yield Path(short)


def test_only_its_user_enters_it_and_it_is_gone_afterwards(place):
    with private_folder() as folder:
        assert folder.parent == place and stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "socket").touch()
    assert not list(place.iterdir())


def test_what_a_killed_process_left_is_removed_by_the_next_and_what_a_living_one_holds_is_not(place):
    left = place / "nemo_jepo_serve_abcdefgh"
    (left / "folder").mkdir(parents=True)
    other = place / "nemo_jepo_serve_of_mine"  # nobody's: another name
    other.mkdir()
    (place / "nemo_jepo_serve_symbolic").symlink_to(other)
    with private_folder() as first, private_folder() as second:
        assert first.is_dir() and second.is_dir() and not left.exists()
    assert other.is_dir()


def test_a_folder_whose_sockets_would_have_too_long_a_path_is_not_used(tmp_path, monkeypatch):
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with private_folder() as folder:
        assert folder.parent == Path("/tmp")
        assert len(os.fsencode(folder)) <= processes._LONGEST_FOLDER


def test_one_that_is_taken_before_it_is_locked_is_made_again(place, monkeypatch):
    made: list[Path] = []

    def make(**options: object) -> str:
        made.append(Path(real(**options)))
        if len(made) == 1:
            made[0].rmdir()  # another process took it for one that is left
        return str(made[-1])

    real = tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", make)
    with private_folder() as folder:
        assert folder == made[1] and folder.is_dir()
