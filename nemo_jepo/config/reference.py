"""The page of settings, generated from the schema: key, type, default, rule and the sentence under the field.

python -m nemo_jepo.config.reference > docs/reference/configuration.md
"""

import ast
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from nemo_jepo.config.rules import rules_of
from nemo_jepo.config.schema import Config

HEAD = """\
# Settings

<!-- Generated from the schema by `make reference`. -->

Every setting of a run. A conf file, or `key=value` on the command line, holds only what differs from the defaults;
`nemo-jepo train --config-name NAME --cfg job` prints all of them resolved. A setting that breaks its rule stops a run
before a model is built, with one line: `key=value: broken rule. What to do.` Rules between settings (a batch that the
replicas cannot share, an objective that needs another sampler) are checked as well, and say the same.
"""
LONGEST_DEFAULT = 60


def page() -> str:
    """The page, in Markdown."""
    return "\n".join([HEAD, *_sections(Config(), "")])


def _sections(node: Any, key: str) -> Iterator[str]:
    """The table of one section, then those of the sections inside it; `node` has the section's own defaults."""
    kinds, sentences = get_type_hints(type(node)), _sentences(type(node))
    inner = {declared.name: getattr(node, declared.name) for declared in fields(node)}
    rows = [
        _row(f"{key}.{declared.name}", declared, kinds[declared.name], inner[declared.name], sentences[declared.name])
        for declared in fields(node)
        if not is_dataclass(inner[declared.name]) and not _listed_section(kinds[declared.name])
    ]
    if key:
        yield f"{'#' * (2 + key.count('.'))} {key}\n\n{_prose(inspect.getdoc(type(node)) or '')}\n"
    if rows:
        yield "\n".join(["| key | type | default | rule | meaning |", "| --- | --- | --- | --- | --- |", *rows, ""])
    for name, value in inner.items():
        if is_dataclass(value):
            yield from _sections(value, f"{key}.{name}".lstrip("."))
        elif section := _listed_section(kinds[name]):
            yield from _sections(section(), f"{key}.{name}[]".lstrip("."))


def _listed_section(kind: Any) -> type | None:
    """The dataclass of each section in a list of them; None for anything else."""
    held = get_args(kind)[0] if get_origin(kind) is list else None
    return held if is_dataclass(held) and isinstance(held, type) else None


def _row(key: str, declared: Field, kind: Any, default: Any, sentence: str) -> str:
    rules = "; ".join(rule.text for rule in rules_of(declared))
    cells = [f"`{key}`", _type_name(kind), _default(default), _prose(rules), _prose(sentence)]
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _sentences(section: type) -> dict[str, str]:
    """Field name -> the docstring under the field, also of what the section inherits."""
    found = _sentences(section.__base__) if is_dataclass(section.__base__) else {}
    (defined,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(defined, ast.ClassDef)
    for statement, following in zip(defined.body, [*defined.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            found[statement.target.id] = ""
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                found[statement.target.id] = inspect.cleandoc(str(following.value.value))
    return found


def _type_name(kind: Any) -> str:
    if kind is Any:
        return "any"
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_type_name(one) for one in get_args(kind))
    if get_origin(kind) is dict:
        return "mapping"
    if get_origin(kind) is list:
        return f"list of {_type_name(*get_args(kind))}"
    return "null" if kind is NoneType else kind.__name__


def _default(value: Any) -> str:
    """As it is written in a conf file."""
    if value == MISSING:
        return "required"
    if isinstance(value, str) and len(value) > LONGEST_DEFAULT:
        return f"a text of {len(value.splitlines())} lines"
    return f"`{value}`" if isinstance(value, str) and value.isidentifier() else f"`{json.dumps(value)}`"


def _prose(text: str) -> str:
    """One paragraph, with what Markdown would take for markup written out; code in backquotes stays as it is."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else _escaped(part) for part in parts)


def _escaped(text: str) -> str:
    return re.sub(r"([*\[{])", r"\\\1", text).replace("<", "&lt;")


if __name__ == "__main__":
    sys.stdout.write(page())
