"""What each objective does with the likelihood of the reference answer. One line a name; what objectives share (std,
clipping, denominators, format, KL) is in `nemo_jepo.objective.update`, and what kind each one is in
`nemo_jepo.config.objectives`.

P prompts, G samples per prompt, T tokens of an answer.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_jepo.config.objectives import OBJECTIVES
from nemo_jepo.objective.estimators import (
    bound_weights,
    leave_one_out_advantage,
    mean_weights,
    multi_sample_advantage,
    no_advantage,
)
from nemo_jepo.objective.likelihood import (
    AnswerLikelihood,
    Reward,
    geometric_mean,
    mean_logprob,
    perplexity_gain,
    probability,
    probability_gain,
    reflective_logprob,
    sum_logprob,
    uncertain_probability,
)

PerSample = Callable[[Tensor, Tensor], Tensor]
"""(reward R [P, G], valid_mask [P, G]) -> [P, G]."""


@dataclass(frozen=True, slots=True)
class LikelihoodTerms:
    """One objective, on the prompts that the reference answer's likelihood scores."""

    reward: Callable[[AnswerLikelihood], Reward]
    """What a sample is worth, and its slope in the answer's token log-probs."""
    advantage: PerSample
    """Raw advantage of the chain of thought."""
    answer_weight: PerSample | None
    """Weight of grad R_i within a prompt; beta_sup and the mean over prompts come later. None: no supervised term."""
    common_scale: bool = False
    """R is proportional to exp(l): the batch's largest l is subtracted where the std divides the scale out again."""


LIKELIHOOD_TERMS = {
    "jepo": LikelihoodTerms(sum_logprob, multi_sample_advantage, bound_weights),
    "jepo_single": LikelihoodTerms(sum_logprob, leave_one_out_advantage, mean_weights),
    "jepo_rl": LikelihoodTerms(sum_logprob, multi_sample_advantage, bound_weights),
    "verifree": LikelihoodTerms(probability, leave_one_out_advantage, mean_weights, common_scale=True),
    "avg_logprob": LikelihoodTerms(mean_logprob, leave_one_out_advantage, mean_weights),
    "gm": LikelihoodTerms(geometric_mean, leave_one_out_advantage, mean_weights),
    "rlpr": LikelihoodTerms(probability_gain, leave_one_out_advantage, mean_weights),
    "r3": LikelihoodTerms(reflective_logprob, leave_one_out_advantage, mean_weights),
    "nrt": LikelihoodTerms(uncertain_probability, leave_one_out_advantage, mean_weights),
    "vr_cli": LikelihoodTerms(perplexity_gain, leave_one_out_advantage, None),
    "sft_sampled_chain": LikelihoodTerms(sum_logprob, no_advantage, mean_weights),
}
"""objective.name -> terms, of every objective that scores each sample by likelihood: not rloo, dpo, sft."""


def uses_verifiable_reward(name: str, verifiable_reward: Tensor, unverifiable: str = "likelihood") -> Tensor:
    """Which prompts are trained on a reward of their own answers, and so keep them in the splice.

    verifier: all. verifier_or_likelihood: those where at least one generation earned a positive reward; all of them
    where a judge scores those of the others. Others: none.

    Args:
        name: objective.name.
        verifiable_reward: [P, G]; 0 or NaN where no reward could be had.
        unverifiable: dpo.unverifiable, of an objective that compares pairs.
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
    if not kind.reads_likelihood or (kind.compares_pairs and unverifiable == "score"):
        return torch.ones_like(verifiable_reward[:, 0]).bool()
    return (verifiable_reward > 0).any(-1)
