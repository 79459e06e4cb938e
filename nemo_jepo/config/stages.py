"""The settings of an end that a metric decides, and of stages. Part of the schema, see `config.schema`.

A stage is a run before the main one, and `config.parts` makes its settings.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from nemo_jepo.config.rules import Rule, setting

MEASURED = ("train_rollouts/", "train_optim/", "val_rollouts/")
IS_METRIC = Rule(
    f"a metric that a step or a validation measures ({', '.join(f'{prefix}NAME' for prefix in MEASURED)})",
    lambda name: name.startswith(MEASURED),
    "Give a name of metrics.jsonl, such as val_rollouts/accuracy",
)


@dataclass(kw_only=True, slots=True)
class UntilConfig:
    """A metric that ends the run early: after the first step that measures it within the bounds."""

    metric: str | None = setting(None, IS_METRIC)
    """Its name in metrics.jsonl, such as val_rollouts/accuracy; null: no metric ends the run."""
    at_least: float | None = None
    """The smallest value that ends the run; null for no such bound."""
    at_most: float | None = None
    """The largest value that ends the run; null for no such bound."""

    def is_met(self, metrics: Mapping[str, float | None]) -> bool:
        """Whether these metrics of one step end the run."""
        value = None if self.metric is None else metrics.get(self.metric)
        if value is None:
            return False
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """A run before the main one, in <run>/stage_1 and so on, from whose final weights the next one starts."""

    max_steps: int = setting(MISSING, ge=1)
    """Most optimizer steps of the stage, and the length of its learning rate's schedule."""
    max_epochs: int | None = setting(None, ge=1)
    """Most passes over its training data; null: no limit."""
    until: UntilConfig = field(default_factory=UntilConfig)
    """A metric that ends the stage earlier."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """What the stage has other than the main run: {rollout.max_tokens: 256, data.train_path: easy.jsonl}."""
