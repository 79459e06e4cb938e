"""What is wrong with a setting or with data, in one line."""

import stat
from pathlib import Path


class ConfigError(ValueError):
    """A setting the user must change: which key, which value, which rule, what to do."""

    def __init__(self, key: str, value: object, rule: str, fix: str) -> None:
        super().__init__(f"{key}={value!r}: {rule}. {fix}.")


class SettingsError(ConfigError):
    """The same, where the line is written already."""

    def __init__(self, line: str) -> None:
        ValueError.__init__(self, line)


class DataError(ValueError):
    """Data the user must change: which file, line and field, what is wrong, what to do."""


class RunError(RuntimeError):
    """What stopped a run that was right to start, in one line: no setting or file is wrong."""


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
