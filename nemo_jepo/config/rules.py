"""A setting's rules, declared with its default; `check.check_fields` reports a broken one under its full key.

warmup_steps: int = setting(0, ge=0)
name: str = setting("constant", choices=("constant", "cosine"))
"""

from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field
from pathlib import Path
from typing import Any


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


def rules_of(declared: Field) -> tuple[Rule, ...]:
    """The rules that a field was declared with."""
    return declared.metadata.get("rules", ())
