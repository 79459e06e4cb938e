"""The records of the objective: settings and scores in, weights out.

P prompts, G samples per prompt. They are read by `nemo_jepo.objective.update` and `nemo_jepo.metrics`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from torch import Tensor

from nemo_jepo.config.objectives import (
    FORMAT_LOSSES,
    LOSS_NORMALIZATIONS,
    NO_CHAIN_POLICIES,
    OBJECTIVES,
    PAIR_VALUES,
    REWARD_NORMALIZATIONS,
)
from nemo_jepo.objective.kl import IMPORTANCE_RATIOS, KL_GRADIENTS
from nemo_jepo.types import PackedRow, Scores, Spliced, SplicedBatch

Reduce = Callable[[Tensor], Tensor]
"""A tensor of this rank -> its sum (or maximum) over data-parallel ranks."""


def only_rank(tensor: Tensor) -> Tensor:
    """The reduction of a run with one data-parallel rank."""
    return tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRule:
    """objective.*, advantage.*, kl.* and dpo.* of the settings as plain values, explained where they are declared."""

    name: str
    beta_sup: float
    rl_reduction: str
    reward_normalization: str
    loss_normalization: str
    no_chain: str
    format_loss: str
    format_weight: float
    importance_sampling: str
    importance_cap: float
    normalize: bool
    clip: float
    std_scope: str
    prompt_mean: str
    kl_beta: float
    kl_estimator: str
    pair_beta: float = 0.1
    reject_longest: bool = False
    unverifiable: str = "likelihood"
    verdict_weight: float = 0.0

    def __post_init__(self) -> None:
        for key, allowed in (
            ("name", list(OBJECTIVES)),
            ("rl_reduction", ["mean", "sum"]),
            ("reward_normalization", list(REWARD_NORMALIZATIONS)),
            ("loss_normalization", list(LOSS_NORMALIZATIONS)),
            ("no_chain", list(NO_CHAIN_POLICIES)),
            ("format_loss", list(FORMAT_LOSSES)),
            ("importance_sampling", list(IMPORTANCE_RATIOS)),
            ("std_scope", ["batch", "group"]),
            ("prompt_mean", ["all", "valid"]),
            ("kl_estimator", list(KL_GRADIENTS)),
            ("unverifiable", list(PAIR_VALUES)),
        ):
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key}={getattr(self, key)!r}: must be one of {', '.join(allowed)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupScores:
    """What the scoring pass says of this rank's groups; every tensor on the host, [P, G] unless stated."""

    answer_logprob: Tensor
    """l_i, nats, summed over the answer's tokens; anything where not valid."""
    valid_mask: Tensor
    """bool: counts in bound, baseline and supervised term. Verifiable prompts: has the marker and a reward."""
    arrived_mask: Tensor
    """bool: False = failed, or its verifier faulted where own answers train; counts nowhere."""
    has_marker: Tensor
    """bool: reached the answer marker."""
    chain_length: Tensor
    """int: scored tokens of c_i (of the whole generation where not valid)."""
    answer_length: Tensor
    """int: scored tokens after the chain."""
    chain_log_ratio: Tensor
    """sum_t log pi(c_t) - log pi_ref(c_t), nats; zeros without a reference policy."""
    chain_k3: Tensor | None = None
    """`k3_estimate` of the same log-ratios, nats; only reported."""
    own_answer_log_ratio: Tensor | None = None
    """The same sum over the sample's own answer, 0 where the reference answer stands behind it; None without a
    reference policy."""
    verifiable_reward: Tensor | None = None
    """float, for rloo and jepo_rl; NaN where it could not be had."""
    faulted_mask: Tensor | None = None
    """bool: the verifier came to no verdict on the own answer; only reported."""
    ends_mask: Tensor | None = None
    """bool: valid, and the reference answer behind it ends the turn; None: none does."""
    end_logprob: Tensor | None = None
    """log pi of that end-of-turn token, nats; anything where there is none; only reported."""
    token_logprobs: Tensor | None = None
    """[P, G, T] l_it, nats, of T tokens of the longest answer; anything behind an answer's end. None: nobody asked."""
    initial_token_logprobs: Tensor | None = None
    """[P, G, T]: the same under the reference policy."""
    no_chain_logprobs: Tensor | None = None
    """[P, T] l0_t, nats: the reference answer behind the bare marker. None: nobody asked."""
    initial_no_chain_logprobs: Tensor | None = None
    """[P, T]: the same under the reference policy."""

    def __post_init__(self) -> None:
        table = self.answer_logprob.shape
        for field in fields(self):
            tensor = getattr(self, field.name)
            if tensor is None:
                continue
            wanted = tuple(table)
            if field.name in ("token_logprobs", "initial_token_logprobs"):
                wanted = (*table, tensor.shape[-1])
            elif field.name in ("no_chain_logprobs", "initial_no_chain_logprobs"):
                wanted = (table[0], tensor.shape[-1])
            if len(table) != 2 or tuple(tensor.shape) != wanted:
                shapes = f"{list(tensor.shape)} beside answer_logprob {list(self.answer_logprob.shape)}"
                raise ValueError(f"{field.name}: every tensor must be [P, G], with tokens [P, G, T], got {shapes}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleWeights:
    """Coefficients of each sample, global denominators included; [P, G] float64 unless stated."""

    policy_weight: Tensor
    """Of grad log pi on every policy-gradient token."""
    answer_weight: Tensor
    """Of grad log pi on every reference-answer token, times answer_slope where there is one."""
    end_weight: Tensor
    """Of grad log pi on the end-of-turn token behind a reference answer, beside answer_weight."""
    kl_weight: Tensor
    """Of the chain's KL loss."""
    advantage: Tensor
    """After scaling and clipping, without the format part."""
    advantage_std: Tensor
    """[3], over the global batch: of the likelihood, the verifiable and the format advantage before scaling."""
    answer_slope: Tensor | None = None
    """[P, G, T] of each answer token's own factor; None where all tokens of an answer weigh the same."""
    verdict_weight: Tensor | None = None
    """Of grad log pi on the verdict behind an own answer (self_verification); None where nobody learns one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A batch of this rank after the scoring pass."""

    batch: SplicedBatch
    rows: Sequence[PackedRow]
    """All of it, packed."""
    policy: Scores
    """Log-probs under the current weights, in the order of `SplicedBatch.to_score`; empty tensors for targets that
    nobody sampled (sft)."""
    graph: Sequence[Tensor] = ()
    """Log-probs of each row with their graph, for the one backward pass; () where the update makes a forward of its
    own."""
    reference: Scores | None
    """The same under the reference policy; None where beta = 0."""
    groups: GroupScores

    @property
    def sequences(self) -> Sequence[Spliced]:
        """N, ordered by (group, sample)."""
        return self.batch.sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceLogprobs:
    """One sequence: chain of thought, then answer. Log-probs that the rule does not read may be None."""

    chain_length: int
    answer_length: int
    own_answer: bool = False
    """The answer was sampled with the chain, so it carries policy gradient."""
    policy_logprobs: Tensor | None = None
    """[chain_length + answer_length] nats, by the weights that are updated; read by KL and importance sampling."""
    reference_logprobs: Tensor | None = None
    """[chain_length + answer_length] nats, by the frozen initial weights; read where kl_weight is not 0."""
    generation_logprobs: Tensor | None = None
    """[chain_length], or [chain_length + answer_length] with own_answer, nats; read by importance sampling."""
