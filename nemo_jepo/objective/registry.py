"""What each objective credits: the advantage of a sampled chain of thought, and the weight of its reference answer.

P prompts, G samples per prompt. One line of the table per objective; everything that objectives share (std, clipping,
denominators, format, KL) is in `nemo_jepo.objective.update`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_jepo.objective.advantages import leave_one_out_advantage, multi_sample_advantage, probability_advantage
from nemo_jepo.objective.bounds import bound_weights
from nemo_jepo.objective.groups import masked, share

PromptTerm = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(answer_logprob [P, G], valid_mask [P, G], log_scale scalar) -> [P, G]."""


def _multi_sample(answer_logprob: Tensor, valid_mask: Tensor, log_scale: Tensor) -> Tensor:
    return multi_sample_advantage(answer_logprob, valid_mask)


def _single_sample(answer_logprob: Tensor, valid_mask: Tensor, log_scale: Tensor) -> Tensor:
    return leave_one_out_advantage(answer_logprob, valid_mask)


def _softmax_share(answer_logprob: Tensor, valid_mask: Tensor, log_scale: Tensor) -> Tensor:
    """grad L_m = sum_i w_i grad l_i."""
    return bound_weights(answer_logprob, valid_mask)


def _equal_share(answer_logprob: Tensor, valid_mask: Tensor, log_scale: Tensor) -> Tensor:
    """grad L_1 = 1/m sum_i grad l_i."""
    return valid_mask * share(valid_mask.sum(-1, keepdim=True))


def _probability_share(answer_logprob: Tensor, valid_mask: Tensor, log_scale: Tensor) -> Tensor:
    """grad 1/m sum_i pi(a*|x, c_i) = 1/m sum_i exp(l_i) grad l_i."""
    probability = masked(answer_logprob - log_scale, valid_mask).exp()
    return probability * _equal_share(answer_logprob, valid_mask, log_scale)


def _no_share(answer_logprob: Tensor, valid_mask: Tensor, log_scale: Tensor) -> Tensor:
    return torch.zeros_like(answer_logprob)


def _never(verifiable_reward: Tensor) -> Tensor:
    return torch.zeros(verifiable_reward.shape[0], dtype=torch.bool, device=verifiable_reward.device)


def _always(verifiable_reward: Tensor) -> Tensor:
    return ~_never(verifiable_reward)


def _where_one_succeeds(verifiable_reward: Tensor) -> Tensor:
    return (verifiable_reward > 0).any(-1)


@dataclass(frozen=True, slots=True)
class ObjectiveTerms:
    """One objective."""

    advantage: PromptTerm
    """Raw advantage of the chain of thought, for prompts scored by the reference answer's likelihood."""
    answer_weight: PromptTerm
    """Weight of grad l_i within a prompt; beta_sup and the mean over prompts come later."""
    verifiable: Callable[[Tensor], Tensor] = _never
    """verifiable_reward [P, G] -> [P] bool: prompts scored by the verifiable reward of their own answers instead."""
    reads_probability: bool = False
    """The reward is exp(l_i), which needs a common scale."""

    @property
    def reads_verifiable_reward(self) -> bool:
        """Some prompts may train on it."""
        return self.verifiable is not _never


OBJECTIVE_TERMS = {
    "jepo": ObjectiveTerms(_multi_sample, _softmax_share),
    "jepo_single": ObjectiveTerms(_single_sample, _equal_share),
    "vr_cli": ObjectiveTerms(_single_sample, _no_share),
    "prob_pg": ObjectiveTerms(probability_advantage, _probability_share, _never, True),
    "rloo": ObjectiveTerms(_multi_sample, _no_share, _always),
    "jepo_rl": ObjectiveTerms(_multi_sample, _softmax_share, _where_one_succeeds),
}
"""objective.name -> terms; sft has neither advantage nor groups and is `supervised_credits`."""


def uses_verifiable_reward(rule_name: str, verifiable_reward: Tensor) -> Tensor:
    """Which prompts are trained on the verifiable reward of their own answers, and so keep them in the splice.

    rloo: all. jepo_rl: those where at least one generation earned a positive reward. Others: none.

    Args:
        rule_name: objective.name.
        verifiable_reward: [P, G]; 0 or NaN where no reward could be had.
    Returns:
        [P] bool.
    Raises:
        ValueError: no such objective.
    Source: arXiv 2503.19618, Section 7.
    """
    if rule_name == "sft":
        return _never(verifiable_reward)
    if rule_name not in OBJECTIVE_TERMS:
        raise ValueError(f"no objective {rule_name!r}; there are {', '.join([*OBJECTIVE_TERMS, 'sft'])}")
    return OBJECTIVE_TERMS[rule_name].verifiable(verifiable_reward)
