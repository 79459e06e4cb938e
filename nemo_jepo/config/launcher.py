"""What torchrun, or a script that starts processes as it does, says to each of them."""

import os

from nemo_jepo.config.errors import ConfigError


def world_size() -> int:
    """Processes of the run, 1 where none says so.

    Raises:
        ConfigError: WORLD_SIZE, RANK, LOCAL_WORLD_SIZE or LOCAL_RANK is no whole number, or a rank is not below its
            world's size.
    """
    size = _sizes("WORLD_SIZE", "RANK")
    _sizes("LOCAL_WORLD_SIZE", "LOCAL_RANK")
    return size


def _sizes(size_name: str, rank_name: str) -> int:
    size, rank = _number(size_name, 1, least=1), _number(rank_name, 0, least=0)
    if size_name in os.environ and rank >= size:
        rule = f"is not below {size_name}={size}"
        raise ConfigError(rank_name, rank, rule, "Start all processes with torchrun, or unset both for one process")
    return size


def _number(name: str, default: int, least: int) -> int:
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10) or int(text) < least:
        rule = f"is no whole number of at least {least}"
        raise ConfigError(name, text, rule, "torchrun sets it; unset it for one process")
    return int(text)
