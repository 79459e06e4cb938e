"""What one disturbance came to."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Round:
    """One disturbance, and what was wrong when all was over."""

    kind: str
    """What was done, in words: a row of the table."""
    seconds: float
    """What it cost."""
    problems: list[str]
    """Nothing where it made no difference."""
