"""What may be done to a prepared set beyond its filters: one step for each option of the command.

One rule holds for all of it: a step that drops rows drops them of the training split alone, and a step that adds a
column adds it to every split. So an evaluation set stays what its authors published.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pyarrow

from nemo_jepo.config.errors import ConfigError, DataError
from nemo_jepo.tools.prepare.records import Splits

DECIMAL = re.compile(r"[0-9]+(\.[0-9]+)?|\.[0-9]+")

Account = dict[str, Any]
"""What the manifest says of a step: JSON."""


@dataclass(frozen=True, slots=True)
class Step:
    """One option of the command, ready to be applied: its value is checked and its files are read."""

    name: str
    """The option's, with _ for -."""
    apply: Callable[[Splits], tuple[Splits, Account]]
    drops: bool = False
    """Whether it drops training rows."""
    column: pyarrow.Field | None = None
    """What it adds; the field of `Example` of the same name has the values."""
    before_hold_out: bool = False
    """Applied to the training rows before some become the validation split."""

    @property
    def option(self) -> str:
        """As the user writes it."""
        return f"--{self.name.replace('_', '-')}"


def run(steps: Sequence[Step], splits: Splits) -> tuple[Splits, list[Account]]:
    """The splits after all steps, and each step's account."""
    accounts = []
    for step in steps:
        splits, account = step.apply(splits)
        accounts.append({"step": step.name} | account)
    return splits, accounts


def dropped(splits: Splits, stays: Sequence[bool], account: Account, note: str = "") -> tuple[Splits, Account]:
    """The splits with the training rows that stay, and the account with both numbers of rows.

    Args:
        stays: one for each training row.
        note: more to say about it in the line that people read.
    Raises:
        DataError: no training row stays.
    """
    rows = [row for row, stay in zip(splits["train"], stays, strict=True) if stay]
    says = f"{len(stays) - len(rows)} of {len(stays)} training rows dropped{note}"
    if not rows:
        raise DataError(f"{says}: none is left. Ask for less, or give other rows.")
    counts = {"rows_before": len(stays), "rows_after": len(rows)}
    return splits | {"train": rows}, account | counts | {"says": says}


def exact_number(option: str, value: str, rule: str, example: str) -> Fraction:
    """The decimal number from 0 to 1 that the text writes, without rounding.

    Raises:
        ConfigError: it writes none, with `rule` for what the option asks for.
    """
    if len(value) > 20 or DECIMAL.fullmatch(value) is None or Fraction(value) > 1:
        raise ConfigError(option, value, rule, f"Give for example {example}")
    return Fraction(value)


def whole_number(option: str, value: str, *, least: int, example: int) -> int:
    """The whole number that the text writes.

    Raises:
        ConfigError: it writes none of at least `least`.
    """
    if not (value.isascii() and value.isdigit()) or len(value) > 9 or int(value) < least:
        raise ConfigError(option, value, f"must be a whole number from {least}", f"Give for example {example}")
    return int(value)
