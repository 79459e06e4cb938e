"""The mathematics of JEPO: pure functions of tensors, torch and the standard library alone.

Start at `sample_weights` and `token_weights`: scores of a batch in, one weight per token out.
docs/concepts/objective.md is the derivation.
"""

from nemo_jepo.objective.estimators import (
    leave_one_out_advantage,
    multi_sample_advantage,
    multi_sample_bound,
    scale_and_clip,
    single_sample_bound,
)
from nemo_jepo.objective.records import GroupScores, SampleWeights, Scored, SequenceLogprobs, UpdateRule
from nemo_jepo.objective.registry import uses_verifiable_reward
from nemo_jepo.objective.tables import group_scores
from nemo_jepo.objective.update import sample_weights, sequence_weights, supervised_weights, token_weights

__all__ = [
    "GroupScores",
    "SampleWeights",
    "Scored",
    "SequenceLogprobs",
    "UpdateRule",
    "group_scores",
    "leave_one_out_advantage",
    "multi_sample_advantage",
    "multi_sample_bound",
    "sample_weights",
    "scale_and_clip",
    "sequence_weights",
    "single_sample_bound",
    "supervised_weights",
    "token_weights",
    "uses_verifiable_reward",
]
