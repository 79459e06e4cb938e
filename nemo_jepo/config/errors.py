"""What is wrong with a setting or with data, in one line."""

import stat
from pathlib import Path

LONGEST_VALUE, LONGEST_LINE = 300, 1500
"""Characters of a value that a message shows, and of a message."""


def one_line(text: str) -> str:
    """The text with every character that would break the line, or cannot be printed, written as its escape."""
    return cut("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text), LONGEST_LINE)


def cut(text: str, most: int) -> str:
    """The text, without its middle where it is longer."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def shown(value: object) -> str:
    """A value as messages show it, cut where it is very long."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply; more digits than Python writes
        text = f"a {type(value).__name__} that cannot be written out"
    return cut(text, LONGEST_VALUE)


class ConfigError(ValueError):
    """A setting the user must change: which key, which value, which rule, what to do."""

    def __init__(self, key: str, value: object, rule: str, fix: str) -> None:
        super().__init__(one_line(f"{cut(key, LONGEST_VALUE)}={shown(value)}: {rule}. {fix}."))


class SettingsError(ConfigError):
    """The same, where the line is written already."""

    def __init__(self, line: str) -> None:
        ValueError.__init__(self, one_line(line))


class DataError(ValueError):
    """Data the user must change: which file, line and field, what is wrong, what to do."""

    def __init__(self, line: str) -> None:
        super().__init__(one_line(line))


class RunError(RuntimeError):
    """What stopped a run that was right to start, in one line: no setting or file is wrong."""


def read_private(key: str, file: str) -> str:
    """The one word in a file that only its owner can read; `key` is the setting that names it.

    Raises:
        ConfigError: there is none, others can read it, or it holds another number of words.
    """
    path = Path(file)
    try:
        if not path.is_file():
            raise ConfigError(key, file, "no such file", "Write the key into it")
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(key, file, "others may read it", f"Run: chmod 600 {file}")
        text = path.read_bytes().decode("utf-8", "replace").strip()
    except OSError as error:
        raise ConfigError(key, file, f"cannot be read ({error.strerror})", "Write the key into it") from error
    if not text:
        raise ConfigError(key, file, "is empty", "Write the key into it")
    if len(text.split()) != 1 or not text.isascii():
        raise ConfigError(key, file, "holds more than one plain word", "Write the key alone into it")
    return text
