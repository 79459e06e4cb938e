"""The settings that name a model or a tokenizer: with the commit of a name of the hub, and with its folder here."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from omegaconf import OmegaConf

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.hub import folder_of, is_hub_name, require_here
from nemo_jepo.config.reading import library
from nemo_jepo.config.schema import Config

MODEL, TOKENIZER = "pretrained_checkpoint.restore_from_path", "tokenizer.path"


def with_commits(config: Config, run_folder: Path, has_saved: bool) -> Config:
    """owner/name@commit in the place of every hub name; its config and tokenizer are downloaded.

    Args:
        has_saved: there is a checkpoint of the run. Where it goes on (exp_manager.resume_if_exists), a name without a
            revision is the commit that the run began with, by its config.yaml.
    Raises:
        ConfigError: see `nemo_jepo.config.hub.folder_of`; or a revision is another commit than when the run began.
    """
    file = run_folder / "config.yaml"
    goes_on = has_saved and config.exp_manager.resume_if_exists and file.exists()
    with library("exp_manager.name", str(file), "cannot be read", "Give another name, or remove the run"):
        began = OmegaConf.load(file) if goes_on else OmegaConf.create()
    return _with_models(config, lambda key, model: _with_commit(key, model, OmegaConf.select(began, key)))


def _with_commit(key: str, model: str, began: str | None) -> str:
    if not is_hub_name(model):
        return model
    repo, _, revision = model.partition("@")
    if began is None or began.partition("@")[0] != repo:
        began = None
    named = f"{repo}@{Path(folder_of(key, model if revision or began is None else began)).name}"
    if began is not None and named != began:
        fix = "Give that commit, or another exp_manager.name"
        raise ConfigError(key, model, f"is {named} now, and the run began with {began}", fix)
    return named


def with_folders(config: Config, weights: bool = False) -> Config:
    """The hub's cache folder in the place of every hub name.

    Args:
        weights: download the model's weights too; else configs and tokenizers alone.
    Raises:
        ConfigError: see `nemo_jepo.config.hub.folder_of`.
    """
    return _with_models(config, lambda key, model: folder_of(key, model, weights and key == MODEL))


def require_folders(local: Config) -> None:
    """Raise ConfigError where this node lacks a folder that another one found."""
    _with_models(local, require_here)


def _with_models(config: Config, change: Callable[[str, str], str]) -> Config:
    """The settings with change(key, value) for the model and the tokenizer, where they are given."""
    model, tokenizer = config.pretrained_checkpoint.restore_from_path, config.tokenizer.path
    model, tokenizer = model and change(MODEL, model), tokenizer and change(TOKENIZER, tokenizer)
    return dataclasses.replace(
        config,
        pretrained_checkpoint=dataclasses.replace(config.pretrained_checkpoint, restore_from_path=model),
        tokenizer=dataclasses.replace(config.tokenizer, path=tokenizer),
    )
