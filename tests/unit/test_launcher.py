"""What a launcher says to its processes is read as numbers, or is one line."""

import pytest

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.launcher import world_size

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("said", "expected"),
    [({}, 1), ({"RANK": "3"}, 1), (dict(zip(NAMES, ("16", "15", "8", "7"), strict=True)), 16)],
)
def test_a_launcher_says_how_many_processes_there_are(monkeypatch, said, expected):
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert world_size() == expected


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE='abc': is no whole number of at least 1."),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0': is no whole number of at least 1."),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE='9999"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK='-1': is no whole number of at least 0."),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2: is not below WORLD_SIZE=2."),
        ({"LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "4"}, "LOCAL_RANK=4: is not below LOCAL_WORLD_SIZE=4."),
    ],
)
def test_what_makes_no_sense_is_one_line(monkeypatch, said, line):
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as error:
        world_size()
    assert str(error.value).startswith(line) and "\n" not in str(error.value)
