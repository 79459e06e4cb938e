"""What is wrong with a setting or with data, in one line, and the rules that one setting can break."""

import stat
from collections.abc import Sequence
from pathlib import Path


class ConfigError(ValueError):
    """A setting the user must change: which key, which value, which rule, what to do."""

    def __init__(self, key: str, value: object, rule: str, fix: str) -> None:
        super().__init__(f"{key}={value!r}: {rule}. {fix}.")


class DataError(ValueError):
    """Data the user must change: which file, line and field, what is wrong, what to do."""


def one_of(key: str, value: object, allowed: Sequence[object]) -> None:
    """Raise ConfigError unless the value is one of those allowed."""
    if value not in allowed:
        raise ConfigError(key, value, f"must be one of {', '.join(map(str, allowed))}", "Choose one of these")


def at_least(key: str, value: float | None, low: float) -> None:
    """Raise ConfigError for a value below `low`; None is allowed."""
    if value is not None and value < low:
        raise ConfigError(key, value, f"must be at least {low}", "Raise it")


def in_unit_interval(key: str, value: float) -> None:
    """Raise ConfigError for a share below 0 or above 1."""
    if not 0 <= value <= 1:
        raise ConfigError(key, value, "must lie in [0, 1]", "Give a share")


def existing(key: str, path: str | None, fix: str) -> None:
    """Raise ConfigError for a path that does not exist; None is allowed."""
    if path is not None and not Path(path).exists():
        raise ConfigError(key, path, "no such file or folder", fix)


def read_private(key: str, file: str) -> str:
    """The one word in a file that only its owner can read; `key` is the setting that names it.

    Raises:
        ConfigError: there is none, others can read it, or it holds another number of words.
    """
    path = Path(file)
    if not path.is_file():
        raise ConfigError(key, file, "no such file", "Write the key into it")
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(key, file, "others may read it", f"Run: chmod 600 {file}")
    text = path.read_text().strip()
    if not text:
        raise ConfigError(key, file, "is empty", "Write the key into it")
    if len(text.split()) != 1 or not text.isascii():
        raise ConfigError(key, file, "holds more than one plain word", "Write the key alone into it")
    return text
