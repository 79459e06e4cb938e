"""Where Hydra meets the dataclasses: from a command line to one checked `Config`, or one line that says what to change.

    argv -> compose (typed by the schema) -> resolve (rules of one field) -> check (rules between settings)

Neither torch nor NeMo is imported here, so a wrong setting is reported within a second. A conf file begins its
defaults list with `nemo_jepo_schema`; a folder of one's own (`--config-path DIR`) also sees the groups of conf/.
"""

import argparse
import contextlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import hydra
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from nemo_jepo.config.check import check, check_fields
from nemo_jepo.config.conf_files import conf_dir
from nemo_jepo.config.errors import ConfigError, SettingsError
from nemo_jepo.config.keys import KEYS, is_valid, nearest_key, one_line_errors
from nemo_jepo.config.launcher import world_size
from nemo_jepo.config.objectives import RENAMED_OBJECTIVES
from nemo_jepo.config.rules import plain_fault
from nemo_jepo.config.schema import Config
from nemo_jepo.config.usage import usage

DEFAULT_CONFIG = "jepo"


class ConfSearchPath(SearchPathPlugin):
    """Lets a user's own conf folder find our groups and primary configs, after its own."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="nemo_jepo", path=f"file://{conf_dir()}")


ConfigStore.instance().store(name="nemo_jepo_schema", node=Config)
Plugins.instance().register(ConfSearchPath)


def _parsed(overrides: Sequence[str]) -> Iterator[Override]:
    """The overrides by Hydra's grammar; what is wrong with one names it."""
    parser = OverridesParser.create()
    for text in overrides:
        with one_line_errors(text):
            try:
                parsed = parser.parse_override(text)
            except HydraException as error:
                why = " ".join(line for line in str(error).splitlines() if "^" not in line)
                rule = f"is no override ({why.removeprefix(f'Error parsing override {text!r} ')})"
                raise ConfigError("setting", text, rule, "Write key=value, and quote a text: 'key=\"a: b\"'") from error
        yield parsed


def _refuse_unknown_keys(overrides: Sequence[str]) -> None:
    """OmegaConf answers `+model.typo=1` with a bare AttributeError, so keys are looked up before it sees them."""
    for override in _parsed(overrides):
        key = override.key_or_group
        if not key.startswith(("hydra.", "hydra/")) and not is_valid(key):
            raise ConfigError(key, override.value(), "no such key", f"Did you mean {nearest_key(key)}")


def _mappings_take_keys(overrides: Sequence[str]) -> list[str]:
    """`data.task_args={max_terms: 3}` as Hydra wants it, with ++: a free-form mapping takes any key."""
    free = [
        "dict" in str(KEYS.get(one.key_or_group)) and isinstance(one.value(), dict) and one.type == OverrideType.CHANGE
        for one in _parsed(overrides)
    ]
    return [f"++{text}" if is_free else text for text, is_free in zip(overrides, free, strict=True)]


def compose(config_name: str, overrides: Sequence[str] = (), config_path: str | Path | None = None) -> DictConfig:
    """The config that a command line describes, typed by the schema but not yet resolved.

    Args:
        config_name: a file of `config_path` or of conf/, without .yaml.
        overrides: Hydra overrides, `key=value`, `++key=value`, `group=choice`.
        config_path: a folder that is searched before conf/.
    Raises:
        ConfigError: unknown key, wrong type, missing file or choice, malformed YAML or override.
    """
    folder = Path(config_path or conf_dir()).absolute()
    for text in (config_name, str(folder), *overrides):
        if (fault := plain_fault(text)) is not None:
            raise ConfigError("settings", text, *fault)
    with one_line_errors():
        _refuse_unknown_keys(overrides)
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(folder)):
            return hydra.compose(config_name, overrides=_mappings_take_keys(overrides))


def resolve(cfg: DictConfig) -> Config:
    """The dataclasses, every field checked by the rules that it declares (ConfigError names the key).

    A config without nemo_jepo_schema, such as a run's saved config.yaml, gets its types here.
    """
    with one_line_errors():
        config = cast(Config, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), cfg)))
    _read_renamed(config)
    check_fields(config)
    return config


def _read_renamed(config: Config) -> None:
    """Names of earlier versions become those of today, and rank 0 says so."""
    old = config.objective.name
    if old in RENAMED_OBJECTIVES:
        config.objective.name = RENAMED_OBJECTIVES[old]
        if os.environ.get("RANK", "0") == "0":
            print(f"objective={old} is called {config.objective.name} now; the old name goes with the next version")


def read_command_line(argv: Sequence[str], trains: bool = True) -> Config | None:
    """The checked settings of a Hydra command line; None where it only asked for something to be printed.

    Neither NeMo nor torch is imported, so that a wrong setting and `--help` are answered at once on every rank.

    Args:
        argv: the command line without the program's name and the command. --config-path (or --config-dir) is taken
            from the working directory and may use everything in conf/.
        trains: False for evaluate, which needs no training data and takes --model.
    Raises:
        ConfigError: the first wrong setting.
    """
    arguments = _options(argv)
    if arguments.model is not None:
        arguments.overrides = with_model(arguments.model, arguments.overrides, trains)
    name = arguments.config_name or DEFAULT_CONFIG
    folder = Path(arguments.config_path or arguments.config_dir or conf_dir()).absolute()
    if arguments.multirun:
        raise ConfigError("--multirun", True, "one process trains one model", "Start one run for each setting")
    if arguments.experimental_rerun is not None:  # a pickle, which runs what it says
        raise ConfigError("--experimental-rerun", arguments.experimental_rerun, "is not read", "Give the settings")
    if arguments.help:
        print(usage(conf_dir(), DEFAULT_CONFIG, Config))
        return None
    composed = compose(name, arguments.overrides, folder)
    if arguments.cfg == "job":
        with one_line_errors():
            text = OmegaConf.to_yaml(_section(composed, arguments.package), resolve=True)
        print(text, end="")
        return None
    if arguments.cfg or arguments.info or arguments.hydra_help or arguments.shell_completion:
        _show_by_hydra(arguments, str(folder), name)
        return None
    config = resolve(composed)
    check(config, world_size(), trains)
    return config


def _options(argv: Sequence[str]) -> argparse.Namespace:
    """The options of a command line, and its overrides."""
    parser = get_args_parser()
    parser.add_argument("--model", nargs="?", const="")

    def refuse(message: str) -> NoReturn:
        raise SettingsError(f"command line: {message}. See nemo-jepo train --help.")

    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_args(list(argv))


def _show_by_hydra(arguments: argparse.Namespace, folder: str, config_name: str) -> None:
    """What Hydra prints of the composition and of itself; ConfigError with its last word where it cannot."""
    said = io.StringIO()
    try:
        with one_line_errors(), contextlib.redirect_stderr(said):
            _run_hydra(arguments, get_args_parser(), print, folder, config_name)
    except SystemExit as end:
        if end.code:
            lines = said.getvalue().split("\n\n")[0].split()
            raise SettingsError(f"command line: Hydra cannot show this ({' '.join(lines)}).") from end


def with_model(model: str, overrides: Sequence[str], trains: bool) -> list[str]:
    """The overrides that `evaluate --model MODEL` stands for: this model, whatever a run has trained."""
    if trains:
        fix = "Use pretrained_checkpoint.restore_from_path=MODEL"
        raise ConfigError("--model", model, "is an option of evaluate, which trains nothing", fix)
    if not model or "=" in model:
        raise ConfigError("--model", model, "must name a model", "Write --model MODEL")
    quoted = model.replace("\\", r"\\").replace("'", r"\'")
    return [
        "tokenizer.path=null",  # the recipe's; one that is asked for stays
        "exp_manager.name=evaluate",
        "exp_manager.resume_if_exists=false",
        *overrides,
        "model.hf_config=null",
        "model.hf_config_path=null",
        f"pretrained_checkpoint.restore_from_path='{quoted}'",
    ]


def _section(composed: DictConfig, key: str | None) -> DictConfig:
    """The node that --package names; the whole without it."""
    node = composed if key is None else OmegaConf.select(composed, key)
    if not isinstance(node, DictConfig):
        raise ConfigError("--package", key, "is no section of settings", "Name one, such as model.optim")
    return node


def to_yaml(config: Config) -> str:
    """Every setting with its value: a conf file that `--config-path FOLDER --config-name config` reads again."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested settings; lists and empty mappings are values."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
