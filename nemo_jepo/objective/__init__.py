"""The mathematics of JEPO: pure functions of tensors, torch and the standard library alone.

Start at `sample_credits` and `token_weights`: scores of a batch in, one weight per token out. docs/objective.md is the
derivation.
"""

from nemo_jepo.objective.metrics import update_metrics
from nemo_jepo.objective.records import GroupScores, SampleCredits, SequenceLogprobs, UpdateRule
from nemo_jepo.objective.registry import uses_verifiable_reward
from nemo_jepo.objective.update import sample_credits, supervised_credits, token_weights

__all__ = [
    "GroupScores",
    "SampleCredits",
    "SequenceLogprobs",
    "UpdateRule",
    "sample_credits",
    "supervised_credits",
    "token_weights",
    "update_metrics",
    "uses_verifiable_reward",
]
