"""A setting's rules, declared with its default; `check.check_fields` reports a broken one under its full key.

warmup_steps: int = setting(0, ge=0)
name: str = setting("constant", choices=("constant", "cosine"))
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field
from pathlib import Path
from typing import Any

LONGEST_NAME, LONGEST_PATH = 255, 3000
"""Bytes: of a file's name, and of a folder's path that leaves room for what is written into it (of 4,096)."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What a value must be. A null of a setting that may be null breaks no rule."""

    text: str
    """Completes "must be": at least 1; one of cpu, gpu."""
    holds: Callable[[Any], bool]
    fix: str
    """What to do about a broken rule, without the full stop."""


def setting(
    default: Any,
    *rules: Rule,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    choices: Sequence[str] | None = None,
    exists: bool = False,
    because: str = "",
    fix: str | None = None,
) -> Any:
    """A dataclass field with a default and the rules of its value.

    Args:
        default: the value, or a function that makes it.
        rules: further rules, for what the keywords cannot say.
        ge, gt, le: bounds: at least, more than, at most. NaN breaks each of them.
        choices: the allowed values.
        exists: the value is the path of a file or folder.
        because: the reason of the last rule, for the message.
        fix: what to do, in the place of "Raise it", "Lower it" and so on.
    """
    found = list(rules)
    if ge is not None:
        found.append(Rule(f"at least {ge}", lambda value: value >= ge, fix or "Raise it"))
    if gt is not None:
        found.append(Rule(f"more than {gt}", lambda value: value > gt, fix or "Raise it"))
    if le is not None:
        found.append(Rule(f"at most {le}", lambda value: value <= le, fix or "Lower it"))
    if choices is not None:
        found.append(Rule(f"one of {', '.join(choices)}", lambda value: value in choices, fix or "Choose one of these"))
    if exists:
        text = "a file or folder that exists"
        found.append(Rule(text, lambda path: Path(path).exists(), fix or "Give the path of one"))
    if because:
        last = found.pop()
        found.append(Rule(f"{last.text}: {because}", last.holds, last.fix))
    metadata = {"rules": tuple(found)}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def path_that_fits(text: str) -> bool:
    """Whether a file system takes such a name, and files with names of their own below it."""
    return len(text.encode()) <= LONGEST_PATH and all(len(part.encode()) <= LONGEST_NAME for part in text.split("/"))


def plain_fault(value: Any) -> tuple[str, str] | None:
    """What no setting may hold, whatever its other rules say: (rule, fix), or None where a leaf of settings is fine.

    A number that is not finite or beyond 64 bits breaks what is computed with it much later; half of a surrogate pair
    cannot be written, and no path or argument holds a NUL.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number", "Give a number"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "must be a whole number of 64 bits", "Give a smaller one"
    if isinstance(value, str) and "\0" in value:
        return "must be a text without NUL", "Leave it out"
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        return "must be a text, and holds half of a surrogate pair", "Write it in UTF-8"
    return None


def rules_of(declared: Field) -> tuple[Rule, ...]:
    """The rules that a field was declared with."""
    return declared.metadata.get("rules", ())
