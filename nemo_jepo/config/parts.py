"""The parts of a run, one after another: the warm-up, the stages, the main run. Each is a run of its own.

<run>/warmup -> <run>/stage_1 -> <run>/stage_2 -> ... -> <run>
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from omegaconf import OmegaConf

from nemo_jepo.config.errors import ConfigError, SettingsError
from nemo_jepo.config.keys import KEYS, is_valid, nearest_key, one_line_errors
from nemo_jepo.config.schema import Config
from nemo_jepo.config.warmup import warmup_config

WARMUP, STAGE = "warmup", "stage_"
"""Names of folders in the run's."""

SHARED = (
    "stages",
    "warmup",
    "exp_manager",
    "pretrained_checkpoint",
    "tokenizer",
    "model",
    "trainer.num_nodes",
    "trainer.devices",
    "trainer.precision",
    "trainer.stuck_timeout_s",
    "rollout.name",
    "rollout.servers",
    "rollout.vllm",
)
"""What all parts of a run have in common: its folder, its machines, its servers, its model."""
OF_A_PART = ("model.optim", "model.tokens_per_micro_batch", "model.update_passes")
"""Of these, what a stage may change all the same."""
ENDS = ("trainer.jepo.max_steps", "trainer.jepo.max_epochs", "trainer.jepo.until")
"""What stands beside a stage's overrides."""


class Part(NamedTuple):
    """One run of those that make up a run."""

    folder: str
    """In the run's folder; empty for the main run."""
    config: Config


def parts_of(config: Config) -> list[Part]:
    """The warm-up, if there is one, the stages and the main run, in the order in which they train.

    Raises:
        ConfigError: an override of a stage is wrong by itself; the line says of which.
    """
    warmup = [Part(WARMUP, warmup_config(config))] if config.warmup.max_steps else []
    return [*warmup, *stages_of(config), Part("", _alone(config))]


def stages_of(config: Config) -> list[Part]:
    """The stages, numbered from 1; errors as `parts_of`."""
    return [Part(f"{STAGE}{number}", _stage(config, number)) for number in range(1, len(config.stages) + 1)]


def folders_in(run: Path) -> list[Path]:
    """The folders that parts of this run have left, the last first; the main run's is there in any case."""
    stages = {int(path.name.removeprefix(STAGE)): path for path in run.glob(f"{STAGE}*") if _is_numbered(path.name)}
    return [run, *(stages[number] for number in sorted(stages, reverse=True)), run / WARMUP]


@contextmanager
def in_part(folder: str) -> Iterator[None]:
    """A wrong setting in this block is one of this part, and its line begins with that."""
    try:
        yield
    except ConfigError as error:
        raise SettingsError(f"{folder.replace('_', ' ')}: {error}") from error


def _is_numbered(name: str) -> bool:
    return name.removeprefix(STAGE).isdecimal()


def _alone(config: Config) -> Config:
    """Without the runs before it."""
    return dataclasses.replace(config, warmup=dataclasses.replace(config.warmup, max_steps=0), stages=[])


def _stage(config: Config, number: int) -> Config:
    """The run's settings with a stage's overrides, and its own end."""
    stage, settings = config.stages[number - 1], OmegaConf.structured(_alone(config))
    with in_part(f"{STAGE}{number}"):
        for key, value in stage.overrides.items():
            _check_key(key, value)
            with one_line_errors(f"{key}={value}"):
                OmegaConf.update(settings, key, value)
        with one_line_errors("its overrides"):
            changed = cast(Config, OmegaConf.to_object(settings))
    loop = changed.trainer.jepo
    loop.max_steps, loop.max_epochs, loop.until = stage.max_steps, stage.max_epochs, stage.until
    return changed


def _check_key(key: Any, value: Any) -> None:
    """Raise ConfigError unless a stage may have this key."""
    if not isinstance(key, str) or not is_valid(key):
        raise ConfigError(str(key), value, "no such key", f"Did you mean {nearest_key(str(key))}")
    if is_dataclass(KEYS.get(key)):
        raise ConfigError(key, value, "is a section of settings", f"Give each by its whole key, {key}.NAME: VALUE")
    if _is_among(key, ENDS):
        name = key.removeprefix("trainer.jepo.")
        raise ConfigError(key, value, "is the stage's end", f"Write {name} beside overrides")
    if _is_among(key, SHARED) and not _is_among(key, OF_A_PART):
        raise ConfigError(key, value, "is the same in all stages of a run", "Set it for the whole run")


def _is_among(key: str, nodes: tuple[str, ...]) -> bool:
    return any(key == node or key.startswith(f"{node}.") for node in nodes)
