"""Every key of the settings, and what is said of a wrong one: one line, whoever found it.

OmegaConf, Hydra and YAML name a fault in their own words, over several lines; `one_line_errors` makes one of ours.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from difflib import SequenceMatcher
from typing import Any, get_type_hints

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nemo_jepo.config.conf_files import conf_dir
from nemo_jepo.config.errors import SettingsError
from nemo_jepo.config.reading import library
from nemo_jepo.config.schema import Config

LONGEST_KEY = 200
"""Characters of a wrong key that are compared with the right ones."""


def _typed_keys(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, kind in get_type_hints(schema).items():
        yield prefix + name, kind
        if is_dataclass(kind):
            yield from _typed_keys(kind, f"{prefix}{name}.")  # type: ignore[arg-type]


KEYS = dict(_typed_keys(Config))
"""Every dotted key of `Config`, nodes included, with its type."""


def nearest_key(key: str) -> str:
    """The valid key that resembles `key` most, its last part counting as much as the whole."""
    key = key[-LONGEST_KEY:]

    def likeness(candidate: str) -> float:
        names = SequenceMatcher(a=key.rpartition(".")[2], b=candidate.rpartition(".")[2])
        return SequenceMatcher(a=key, b=candidate).ratio() + names.ratio()

    return max(KEYS, key=likeness)


def is_valid(key: str) -> bool:
    """A key of the schema, or one inside a free-form node such as model.hf_config."""
    above = [key[: match.start()] for match in re.finditer(r"\.", key)]
    return key in KEYS or any("dict" in str(KEYS.get(node)) for node in above)


def explain(error: Exception) -> str:
    """One line for an error of Hydra, OmegaConf or YAML: the key, the file when known, the rule, what to do."""
    text = str(error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error)
    file = re.match(r"In '([^']+)'", str(error))
    where = f" (in {file[1]}.yaml)" if file else ""
    if choice := re.search(r"Could not find '(.+)/(.+)'\s+Available options in '.+':\n((?:\t.*\n)+)", text):
        return f"{choice[1]}={choice[2]}{where}: no such choice. Choose one of {', '.join(choice[3].split())}."
    if name := re.match(r"Cannot find primary config '(.+?)'", text):
        ours = ", ".join(sorted(path.stem for path in conf_dir().glob("*.yaml")))
        return f"--config-name {name[1]}: no such file. Choose one of {ours}, or give its folder by --config-path."
    full_key = re.search(r"full_key: (\S+)", text)
    if full_key is None:
        line = re.sub(r"(Config search path:|See https).*", "", " ".join(text.split())).strip()
        return line or f"settings: cannot be read ({type(error).__name__}). Look for what is no plain YAML."
    key = full_key[1]
    if "not in 'StageConfig'" in text:  # whose full_key is not full
        return f"stages: no stage has {key}. Give max_steps, max_epochs, until and overrides."
    if "has missing mandatory value" in text:
        return f"{key}: has no default. Add {key}=VALUE."
    if re.search(r"^Key '.*' (is )?not in", text, re.MULTILINE):
        fix = f"Write +{key}=VALUE to add it" if is_valid(key) else f"Did you mean {nearest_key(key)}"
        return f"{key}{where}: no such key. {fix}."
    given = re.match(r"Error merging override (\S+)", str(error))
    rule = re.sub(r"^In '.*raised while composing config:\n", "", text).split("\n")[0].rstrip(".")
    return f"{given[1] if given else key}{where}: {rule}."


@contextmanager
def one_line_errors(text: str = "the command line or a conf file") -> Iterator[None]:
    """What Hydra, its grammar, OmegaConf and YAML raise in this block over settings is one line; `text` is at fault."""
    with library("setting", text, "cannot be read", "Look for what is no plain YAML"):
        try:
            yield
        except (HydraException, OmegaConfBaseException, YAMLError) as error:
            raise SettingsError(explain(error)) from error
