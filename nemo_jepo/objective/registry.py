"""What each objective does with the likelihood of the reference answer. One line a name; what objectives share (std,
clipping, denominators, format, KL) is in `nemo_jepo.objective.update`, and what kind each one is in
`nemo_jepo.config.objectives`.

P prompts, G samples per prompt, l_i = log pi(a*|x, c_i), T_i tokens of the answer.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_jepo.config.objectives import OBJECTIVES
from nemo_jepo.objective.estimators import (
    bound_weights,
    leave_one_out_advantage,
    mean_logprob,
    mean_weights,
    multi_sample_advantage,
    probability,
    sum_logprob,
)

PerSample = Callable[[Tensor, Tensor], Tensor]
"""(score r [P, G], valid_mask [P, G]) -> [P, G]."""


@dataclass(frozen=True, slots=True)
class LikelihoodTerms:
    """One objective, on the prompts that the reference answer's likelihood scores."""

    score: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """(l, T), both [P, G] -> (r, d r / d l): what a sample is worth."""
    advantage: PerSample
    """Raw advantage of the chain of thought."""
    answer_weight: PerSample | None
    """Weight of grad r_i within a prompt; beta_sup and the mean over prompts come later. None: no supervised term."""
    common_scale: bool = False
    """r is proportional to exp(l): the batch's largest l is subtracted where the std divides the scale out again."""


LIKELIHOOD_TERMS = {
    "jepo": LikelihoodTerms(sum_logprob, multi_sample_advantage, bound_weights),
    "jepo_single": LikelihoodTerms(sum_logprob, leave_one_out_advantage, mean_weights),
    "jepo_rl": LikelihoodTerms(sum_logprob, multi_sample_advantage, bound_weights),
    "vr_cli": LikelihoodTerms(sum_logprob, leave_one_out_advantage, None),
    "prob_pg": LikelihoodTerms(probability, leave_one_out_advantage, mean_weights, common_scale=True),
    "avg_logprob": LikelihoodTerms(mean_logprob, leave_one_out_advantage, mean_weights),
}
"""objective.name -> terms, of every objective that reads the likelihood: not rloo, not sft."""


def uses_verifiable_reward(name: str, verifiable_reward: Tensor) -> Tensor:
    """Which prompts are trained on the verifiable reward of their own answers, and so keep them in the splice.

    verifier: all. verifier_or_likelihood: those where at least one generation earned a positive reward. Others: none.

    Args:
        name: objective.name.
        verifiable_reward: [P, G]; 0 or NaN where no reward could be had.
    Returns:
        [P] bool.
    Raises:
        ValueError: no such objective.
    Source: arXiv 2503.19618, Section 7.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"no objective {name!r}; there are {', '.join(OBJECTIVES)}")
    kind = OBJECTIVES[name]
    if not kind.reads_verifier:
        return torch.zeros(len(verifiable_reward), dtype=torch.bool, device=verifiable_reward.device)
    return (verifiable_reward > 0).any(-1) if kind.reads_likelihood else torch.ones_like(verifiable_reward[:, 0]).bool()
