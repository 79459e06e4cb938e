"""What `nemo-jepo train --help` prints: the options, the conf files, the groups and the sections of settings."""

from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

OPTIONS = """\
nemo-jepo train [--config-name NAME] [key=value ...]
nemo-jepo evaluate [--model MODEL] [--config-name NAME] [key=value ...]

    --model MODEL          evaluate this model, and nothing that a run has trained; data.validation_path is all it needs
    --config-name NAME     a conf file, without .yaml (default: {default})
    --config-path FOLDER   a folder of your own, searched before the conf files that are listed here
    --cfg job              print the resolved settings and stop; --package NODE prints one section of them
    --info, --hydra-help   what Hydra says of the composition, and of itself
    key=value              a setting: model.optim.lr=1e-6; +key=value adds a key inside a free-form mapping
    group=choice           a file of a group: objective=rloo
"""


def usage(conf: Path, default: str, schema: type) -> str:
    """The help text.

    Args:
        conf: the folder of conf files.
        default: the conf file that is used without --config-name.
        schema: the dataclass whose fields are the sections.
    """
    recipes = {path.stem: _first_line(path) for path in sorted(conf.glob("*.yaml"))}
    groups = [folder for folder in sorted(conf.iterdir()) if (folder / f"{_named(schema, folder.name)}.yaml").is_file()]
    choices = {folder.name: ", ".join(sorted(path.stem for path in folder.glob("*.yaml"))) for folder in groups}
    kinds = get_type_hints(schema)
    sections = {field.name: (_section(kinds[field.name]).__doc__ or "").split("\n")[0] for field in fields(schema)}
    tables = {"Conf files": recipes, "Groups": choices, "Sections of settings": sections}
    return "\n".join([OPTIONS.format(default=default), *(_table(title, rows) for title, rows in tables.items())])


def _section(kind: Any) -> type:
    """The dataclass of a section, or of each in a list of them."""
    return get_args(kind)[0] if get_origin(kind) is list else kind


def _named(schema: type, group: str) -> str | None:
    """The default choice of a group: the default `name` of the section that it fills."""
    kind = get_type_hints(schema).get(group)
    return None if kind is None else getattr(kind(), "name", None)


def _first_line(path: Path) -> str:
    comments = (line[2:] for line in path.read_text().splitlines() if not line.startswith("# @package"))
    return next(comments, "")


def _table(title: str, rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join([f"{title}:", *(f"    {name:<{width}}  {text}" for name, text in rows.items()), ""])
