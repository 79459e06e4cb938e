"""The frozen records that pass through one step.

    dataset row -> Prompt -> Rollout -> Spliced -> SplicedBatch -> PackedRow -> scores -> token weights

Shape letters: P prompts, G rollouts per prompt, N = P * G sequences, T tokens, S scored tokens.
Token ids are the sampler's own from the moment they are drawn: nothing here holds text that is tokenized again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

FinishReason = Literal["stop", "length", "failed"]

Pair = tuple[float, float]
"""(sum, count) of a metric: added over ranks, then divided."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question with its known good answer."""

    prompt_id: int
    """Row number in its data set (0-based): names the prompt in logs and seeds its sampling."""
    token_ids: tuple[int, ...]
    """x, [T], as the sampler and the trainer both see it."""
    question: str
    answer: str
    """a*, without the leading space that the splice adds."""
    chain_of_thought: str | None = None
    """A golden (or noisy) chain of thought, only read by `objective=sft`; None where the row has none."""
    verifiable: bool = True
    """False: no verifier can tell whether an own answer equals a*, so none of them earns a verifiable reward."""
    task_entry: str | None = None
    """data=reasoning_gym: the package's own record of the question, which its scorer reads; pickled, in base 64."""
    cluster: str | None = None
    """What data.cluster_key says of it; None where nobody asks."""
    group_key: str | None = None
    """What data.group_key says of it: prompts of one group are in one batch, on one replica. None where nobody asks."""
    occurrence: int = 0
    """How often the global batch holds the prompt before this place: a repeated prompt draws samples of its own."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled completion y_i of a prompt."""

    group: int
    """Which prompt of this replica's batch, 0 <= group < P."""
    sample: int
    """Which sibling, 0 <= sample < G."""
    token_ids: tuple[int, ...]
    """y_i, [T]: the sampler's own ids, without padding. Holds the end-of-turn id if that was drawn."""
    generation_logprobs: tuple[float, ...]
    """[T], nats: log-probs of token_ids under the distribution that they were drawn from, temperature and truncation
    included: what importance ratios divide by."""
    finish_reason: FinishReason
    """stop: marker or end-of-turn; length: cut off; failed: none could be had (masked, counted, never scored)."""
    policy_version: int = 0
    """Number of optimizer steps in the weights that sampled it."""
    untempered: bool = True
    """Drawn from the model's own distribution (temperature 1, no truncation), as the trainer scores it."""


@dataclass(frozen=True, slots=True)
class Spliced:
    """One sequence to score: prompt, chain of thought, answer, side by side in one token row.

    token_ids = x [prompt_length] + c_i [chain_length] + answer [answer_length]; an invalid sample has
    its whole generation in the chain and answer_length 0.
    """

    group: int
    sample: int
    token_ids: tuple[int, ...]
    prompt_length: int
    chain_length: int
    answer_length: int
    valid: bool
    """Holds the marker, aligned to a token end, long enough: counts in bound, baseline and supervised term."""
    has_marker: bool
    """Reached the marker. True and not valid: the marker ended inside a token (or the chain was too short)."""
    misaligned: bool = False
    """The marker's end fell inside a token."""
    marker_length: int = 0
    """The last so many tokens of a valid sample's chain are the marker; what stands before them is its reasoning."""
    own_answer: bool = False
    """The answer is the sample's own (scored by a verifier), not the reference."""
    failed: bool = False
    """Counts nowhere."""
    ends: bool = False
    """The answer is the reference answer, and its last token ends the turn."""
    generation_logprobs: tuple[float, ...] = ()
    """[chain_length], or [chain_length + answer_length] with own_answer; empty when nothing was sampled (sft)."""
    question_length: int = 0
    """Tokens behind an own answer that ask whether it is right (self_verification); they are scored, not trained on."""
    verdict_length: int = 0
    """Tokens behind the question that say yes or no."""
    verdict: bool | None = None
    """What they say; None without any."""

    @property
    def sampled(self) -> bool:
        """Holds tokens that a sampler drew; False for a supervised target, which nobody scores."""
        return bool(self.generation_logprobs)

    @property
    def length(self) -> int:
        """Tokens in the sequence."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplicedBatch:
    """What a replica scores in one pass, and what is known of it beforehand."""

    sequences: Sequence[Spliced]
    """N, ordered by (group, sample)."""
    group_size: int
    """G."""
    rewards: Sequence[float | None] | None = None
    """Verifiable reward of each sequence, None inside where it could not be had; None where nobody asks."""
    no_chain: Sequence[Spliced] | None = None
    """P, of each group its reference answer behind the bare marker; None where nobody reads it."""
    by_token: bool = False
    """Somebody reads the answers token by token."""

    @property
    def to_score(self) -> list[Spliced]:
        """All of them, in the order in which they are counted: the sequences, then those without a chain."""
        return [*self.sequences, *(self.no_chain or ())]


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Segments side by side in one row: one micro-batch.

    token_ids[cu_seqlens[k] : cu_seqlens[k+1]] is segment k: a whole sequence; or what siblings share of their prompt,
    all but its last token; or a sibling from that last token on. The last segments may be padding.
    """

    token_ids: Tensor
    """[T] int64."""
    position_ids: Tensor
    """[T] int64, a token's place in its sequence: a segment starts at 0, or behind its prompt segment."""
    cu_seqlens: Tensor
    """[segments + 1] int32, from 0 to T."""
    prompt_segment: Tensor
    """[segments] int64: the earlier segment whose keys and values this one's queries see as well; -1: none."""
    sequence_index: Tensor
    """[T] int64: which sequence of the batch (0 <= . < N) a token belongs to; -1 on padding and shared prompts."""
    scored_mask: Tensor
    """[T] bool: tokens whose log-prob is needed (chain and answer); the token before one is in its segment too."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What one forward pass says of N sequences; every tensor float32 on the host."""

    policy_logprobs: tuple[Tensor, ...]
    """N tensors, nats, of the tokens after the prompt: [chain_length + answer_length], and behind a sequence with a
    verdict [question_length + verdict_length] more."""
    entropies: tuple[Tensor, ...] = ()
    """N tensors of the same shapes, nats: entropy of each token's distribution; () where nobody asked for them."""
