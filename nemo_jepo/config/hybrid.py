"""Settings of objective.reward=hybrid: the model that is asked about answers which the rule calls wrong."""

from dataclasses import dataclass, field

from nemo_jepo.config.judge import JudgeConfig, model_verifier_config
from nemo_jepo.config.rules import setting


def _verifier_config() -> JudgeConfig:
    """A model verifier that a training step waits for."""
    verifier = model_verifier_config()
    verifier.deadline_s, verifier.cache = 300.0, "verifier_verdicts.jsonl"
    return verifier


@dataclass(kw_only=True, slots=True)
class HybridConfig:
    """The model verifier of objective.reward=hybrid, and the canaries that watch it."""

    verifier: JudgeConfig = field(default_factory=_verifier_config)
    """Asked where the rule calls an own answer wrong; one vote, the likeliest. Off without hybrid.verifier.url."""
    canary_interval: int = setting(20, ge=0)
    """Steps from one round of canaries, answers that answer nothing, to the next; the first before step 1. 0: none."""
    canary_prompts: int = setting(2, ge=1)
    """Prompts of a round, of each data-parallel replica; every one gets an answer of each of 13 kinds."""
    canary_limit: float | None = setting(0.1, ge=0, le=1)
    """The run saves and ends with exit code 1 where more than so many of a round's canaries earn a reward
    (verifier_canary_rate). Null: it goes on."""
