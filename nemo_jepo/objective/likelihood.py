"""What a chain of thought is worth, by the reference answer's likelihood behind it: one function a paper.

P prompts, G samples per prompt, T tokens of the longest answer; answer i has T_i.

    l_it = log pi(a*_t | x, c_i, a*_<t)    p_it = exp(l_it)    l_i = sum_t l_it
    l0_t, p0_t                             the same behind no chain: prompt, marker, answer

A reward comes with its slope, which is what the supervised term needs: beta_sup times

    grad R_i = sum_t slope_it grad l_it

Baselines that no parameter moves, and weights of tokens, are held fixed. Everything is detached and in float64.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

GAIN_STEPS = ((0.05, 0.5), (1.0, 0.9), (2.0, 1.0))
"""vr_cli's reward: (percent of the perplexity that a chain must save, reward from there on); 0 below the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerLikelihood:
    """The reference answer behind the chains of each prompt, and behind none; nats, float64."""

    logprob: Tensor
    """[P, G] l_i; 0 where not valid."""
    length: Tensor
    """[P, G] T_i, tokens."""
    valid_mask: Tensor
    """[P, G] bool."""
    token_logprobs: Tensor | None = None
    """[P, G, T] l_it; anything behind an answer's end and where not valid. None where nobody asks."""
    no_chain_logprobs: Tensor | None = None
    """[P, T] l0_t; anything behind the answer's end. None where nobody asks."""

    @property
    def tokens(self) -> Tensor:
        """[P, G, T] l_it; 0 where there is no token."""
        assert self.token_logprobs is not None
        return torch.where(self.token_mask, self.token_logprobs, 0.0)

    @property
    def no_chain(self) -> Tensor:
        """[P, 1, T] l0_t; 0 where there is no token, everywhere without a valid sample."""
        assert self.no_chain_logprobs is not None
        return torch.where(self.token_mask.any(1), self.no_chain_logprobs, 0.0).unsqueeze(1)

    @property
    def token_mask(self) -> Tensor:
        """[P, G, T] bool: tokens of the answers of valid samples."""
        assert self.token_logprobs is not None
        places = torch.arange(self.token_logprobs.shape[-1], device=self.length.device)
        return (places < self.length.unsqueeze(-1)) & self.valid_mask.unsqueeze(-1)

    @property
    def token_count(self) -> Tensor:
        """[P, G] T_i, at least 1: what a mean over an answer's tokens divides by."""
        return self.length.clamp(min=1)


class Reward(NamedTuple):
    """What the samples are worth."""

    value: Tensor
    """[P, G] R_i; anything where not valid."""
    slope: Tensor
    """[P, G], the same for all tokens of an answer, or [P, G, T]: d R_i / d l_it."""


def sum_logprob(answer: AnswerLikelihood) -> Reward:
    """The answer's log-likelihood.

        R_i = l_i        slope = 1

    Source: arXiv 2503.19618 (JEPO), Eqs. 5 and 7. With a KL in the reward it is LaTRO's, arXiv 2411.04282.
    """
    return Reward(answer.logprob, torch.ones_like(answer.logprob))


def mean_logprob(answer: AnswerLikelihood) -> Reward:
    """The mean log-prob of the answer's tokens.

        R_i = l_i / T_i        slope = 1 / T_i

    Source: arXiv 2602.03979 (average log-prob).
    """
    return Reward(answer.logprob / answer.token_count, 1.0 / answer.token_count.double())


def probability(answer: AnswerLikelihood) -> Reward:
    """The answer's likelihood itself.

        R_i = exp(l_i)        slope = R_i

    It underflows for long answers, so the caller adds a number to every l_i that the whole batch shares: dividing
    advantages by their std cancels it.

    Source: arXiv 2505.21493 (VeriFree); arXiv 2503.19618, Eq. 10.
    """
    value = answer.logprob.exp()
    return Reward(value, value)


def geometric_mean(answer: AnswerLikelihood) -> Reward:
    """The geometric mean of the answer's token probabilities: one improbable token lowers it, whatever the length.

        R_i = exp(l_i / T_i)        slope = R_i / T_i

    Source: arXiv 2602.11549 (NRT, geometric mean).
    """
    value = (answer.logprob / answer.token_count).exp()
    return Reward(value, value / answer.token_count)


def probability_gain(answer: AnswerLikelihood) -> Reward:
    """How much a chain adds to the mean probability of the answer's tokens.

        R_i = clip( 1/T sum_t p_it - 1/T sum_t p0_t, 0, 1 )        slope = p_it / T, of the first mean

    The paper drops the gradient of R, as beta_sup=0 does. Its code takes p0 from the initial policy
    (objective.no_chain=initial) and rounds rewards to bfloat16, which this does not.

    Source: arXiv 2506.18254 (RLPR), Eqs. 2 to 4.
    """
    each, without = answer.tokens.exp() * answer.token_mask, answer.no_chain.exp() * answer.token_mask
    gain = (each - without).sum(-1) / answer.token_count
    return Reward(gain.clamp(0.0, 1.0), each / answer.token_count.unsqueeze(-1))


def reflective_logprob(answer: AnswerLikelihood) -> Reward:
    """Log-probs of the tokens that react to the chain: those that differ within the group.

        R_i = sum_t w_t l_it        w_t = s_t / sum_u s_u,  s_t = std_i(l_it)        slope = w_t, held fixed

    The paper subtracts sum_t w_t l0_t and leaves the increasing w open. What is subtracted is the same for all samples
    of a prompt, so no advantage sees it: it is left out, and no segment without a chain is scored for it. The paper
    drops the gradient of R, as beta_sup=0 does.

    Source: arXiv 2506.13351 (DRO, R3), Section 4.1.3.
    """
    tokens, mask = answer.tokens, answer.token_mask
    count = mask.sum(1, keepdim=True).clamp(min=1)
    deviation = (tokens - tokens.sum(1, keepdim=True) / count) * mask
    spread = (deviation.square().sum(1, keepdim=True) / count).sqrt()
    total = spread.sum(-1, keepdim=True)
    weight = torch.where(total > 0, spread / total, 0.0) * mask
    return Reward((weight * tokens).sum(-1), weight)


def uncertain_probability(answer: AnswerLikelihood) -> Reward:
    """Probabilities of the answer's tokens, each as important as it is uncertain without a chain.

        R_i = max( 0, sum_t v_t p_it - sum_t v_t p0_t )        v_t = log p0_t / sum_u log p0_u        slope = v_t p_it

    v is held fixed, and the slope is that of the first sum: a chain that does not help is worth nothing, and the
    answer behind it is taught all the same. The paper gives v up to its scale; here it sums to 1.

    Source: arXiv 2602.11549 (NRT, weighted sum with -log p).
    """
    surprise = -answer.no_chain * answer.token_mask
    total = surprise.sum(-1, keepdim=True)
    importance = torch.where(total > 0, surprise / total, 0.0)
    each = importance * answer.tokens.exp()
    gain = (each - importance * answer.no_chain.exp()).sum(-1)
    return Reward(gain.clamp(min=0.0), each)


def perplexity_gain(answer: AnswerLikelihood) -> Reward:
    """How much of the answer's perplexity a chain saves, in steps, all of it under the frozen initial policy.

        I_i = 100 (PPL0 - PPL_i) / PPL0        PPL = exp(-1/T sum_t l_t)
        R_i = 0, 0.5, 0.9, 1   from I_i = -inf, 0.05, 1, 2 on        slope = 0: the policy does not move it

    Source: arXiv 2503.22828 (VR-CLI), Section 3.
    """
    without = (answer.no_chain * answer.token_mask).sum(-1)
    saved = -100.0 * torch.expm1((without - answer.logprob) / answer.token_count)
    value = torch.zeros_like(saved)
    for at_least, reward in GAIN_STEPS:
        value = torch.where(saved >= at_least, reward, value)
    return Reward(value, torch.zeros_like(value))
