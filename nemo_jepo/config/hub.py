"""Models by name, `owner/name` or `owner/name@revision` of the Hugging Face hub, where a model's folder may stand.

What lies on this machine under that path comes first. A name becomes the folder of one commit in the hub's own cache:
HF_HOME, HF_HUB_OFFLINE, HF_TOKEN and HF_ENDPOINT mean what they mean to huggingface_hub. Configs, tokenizers and
safetensors are downloaded and nothing else, so nothing that runs when it is read. No torch here.
"""

import os
import re
from pathlib import Path

from nemo_jepo.config.errors import ConfigError

NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?", re.ASCII)
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files beside the weights, where there are any: shape, tokenizer, chat template, sampling."""
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")


def is_model(path: str) -> bool:
    """Whether a setting names a folder, or what may be a name of the hub."""
    return Path(path).is_dir() or is_hub_name(path)


def is_hub_name(path: str) -> bool:
    """Whether a setting can only be a name of the hub."""
    return not Path(path).exists() and NAME.fullmatch(path) is not None


def folder_of(key: str, model: str, weights: bool = False) -> str:
    """The folder of a model: the path itself, or that of the hub's cache, which gets the files that it lacks.

    Args:
        key: of the setting, for the error.
        weights: safetensors too; else config and tokenizer alone.
    Raises:
        ConfigError: the hub has no such model or none of that kind, does not let this user have it, or cannot be
            reached while the cache lacks a file.
    """
    if not is_hub_name(model):
        return model
    from huggingface_hub import snapshot_download  # half a second to import

    repo, _, revision = model.partition("@")
    wanted = [*COMPANIONS, *(WEIGHTS if weights else ())]
    try:
        folder = snapshot_download(repo, revision=revision or None, allow_patterns=wanted, ignore_patterns=["*/*"])
    except Exception as error:  # also those of the HTTP library below
        raise ConfigError(key, model, *_why_not(error, repo)) from error
    if not any((Path(folder) / name).is_file() for name in COMPANIONS):
        raise ConfigError(key, model, "has no config.json and no tokenizer on the hub", "Give one for transformers")
    if weights and not any(Path(folder).glob("model*.safetensors")):
        rule = "has no model*.safetensors on the hub, and nothing else is read"
        raise ConfigError(key, model, rule, "Convert the weights into a folder, and give that")
    return folder


def _why_not(error: Exception, repo: str) -> tuple[str, str]:
    """(rule, fix) for an error of huggingface_hub."""
    from huggingface_hub import constants, errors

    match error:
        case errors.GatedRepoError():
            return "is for users who accepted its terms", "Accept them on the hub, and set HF_TOKEN"
        case errors.RepositoryNotFoundError():
            rule = "is no folder here, and the hub has no such model, or does not show it to you"
            return rule, "Check the name; a private model needs HF_TOKEN"
        case errors.RevisionNotFoundError():
            return "the hub has no such revision of it", "Give a branch, a tag or a commit"
        case errors.LocalEntryNotFoundError():
            why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
            rule = f"is no folder here, the hub's cache does not have all of it, and {why}"
            return rule, f"Check the name, or run `hf download {repo}` where there is a network, with the same HF_HOME"
    return f"cannot be downloaded ({str(error).splitlines()[0]})", "Look at the name, the network and the disk"


def require_here(key: str, folder: str) -> str:
    """A folder that the first rank found in the hub's cache.

    Raises:
        ConfigError: this machine does not have it.
    """
    if not Path(folder).exists():
        rule = f"was downloaded by the first node, and {os.uname().nodename} does not have it"
        raise ConfigError(key, folder, rule, "Set HF_HOME to a folder that all nodes share")
    return folder
