"""A policy small enough that every chain of thought, answer and group of samples can be enumerated.

The chain's vocabulary is {0, 1, MARKER}; a chain ends at the marker or, cut off, after two tokens: 7 chains. The answer
has two binary tokens: 4 answers per chain. Every distribution has its own free logits, all in one parameter vector.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_jepo.objective import GroupScores, SequenceLogprobs, UpdateRule, sample_weights
from nemo_jepo.objective.update import sequence_weights

MARKER = 2
CHAINS = ((2,), (0, 2), (1, 2), (0, 0), (0, 1), (1, 0), (1, 1))
ANSWERS = ((0, 0), (0, 1), (1, 0), (1, 1))
REFERENCE_ANSWER = ANSWERS[2]

PLAIN = UpdateRule(
    name="jepo",
    beta_sup=1.0,
    rl_reduction="mean",
    reward_normalization="none",
    loss_normalization="none",
    no_chain="none",
    format_loss="none",
    format_weight=1.0,
    importance_sampling="none",
    importance_cap=2.0,
    normalize=False,
    clip=1.0,
    std_scope="batch",
    prompt_mean="all",
    kl_beta=0.0,
    kl_estimator="k2_token",
)
"""Raw advantages, no format loss, no KL: the estimators of the equations, to the letter."""

NUM_PARAMETERS = 3 + 2 * 3 + len(CHAINS) * (2 + 4)


class TabularPolicy:
    """Token log-probs of chains and answers as functions of one parameter vector, float64."""

    def __init__(self, seed: int, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(NUM_PARAMETERS, generator=generator, dtype=torch.float64) * scale
        self.parameters = values.requires_grad_()

    def chain_logprobs(self, chain: Sequence[int]) -> Tensor:
        """[tokens of the chain] nats."""
        first = self.parameters[0:3].log_softmax(-1)[chain[0]]
        if len(chain) == 1:
            return first.unsqueeze(0)
        second = self.parameters[3:9].view(2, 3)[chain[0]].log_softmax(-1)[chain[1]]
        return torch.stack([first, second])

    def answer_logprobs(self, chain: Sequence[int], answer: Sequence[int] = REFERENCE_ANSWER) -> Tensor:
        """[2] nats, after the chain."""
        logits = self.parameters[9:].view(len(CHAINS), 6)[CHAINS.index(tuple(chain))]
        first = logits[:2].log_softmax(-1)[answer[0]]
        second = logits[2:].view(2, 2)[answer[0]].log_softmax(-1)[answer[1]]
        return torch.stack([first, second])

    def answer_logprob(self, chain: Sequence[int]) -> Tensor:
        """l = log pi(a*|x, c), nats."""
        return self.answer_logprobs(chain).sum()

    def gradient(self, value: Tensor) -> Tensor:
        """Exact gradient of a scalar in the parameters."""
        return torch.autograd.grad(value, self.parameters)[0]


class Sample:
    """One enumerated outcome: a chain, and the answer that follows it in the scored sequence."""

    def __init__(
        self,
        policy: TabularPolicy,
        chain: Sequence[int],
        answer: Sequence[int] | None,
        own: bool = False,
    ):
        self.chain, self.answer, self.own = chain, answer, own
        logprobs = [policy.chain_logprobs(chain)]
        if answer is not None:
            logprobs.append(policy.answer_logprobs(chain, answer))
        tokens = torch.cat(logprobs)
        self.logprobs = tokens.detach()
        self.gradients = torch.stack([torch.autograd.grad(t, policy.parameters, retain_graph=True)[0] for t in tokens])
        """[tokens, NUM_PARAMETERS]: grad of each token's log-prob."""
        num_sampled = len(tokens) if own else len(chain)
        self.probability = self.logprobs[:num_sampled].sum().exp()
        self.answer_logprobs = torch.full((2,), torch.nan, dtype=torch.float64)
        if answer is not None:
            self.answer_logprobs = self.logprobs[len(chain) :]
        self.answer_logprob = self.answer_logprobs.sum()
        self.no_chain_logprobs = policy.answer_logprobs((MARKER,)).detach()
        """[2] nats of a* behind the bare marker."""

    @property
    def answer_length(self) -> int:
        return len(self.answer) if self.answer is not None else 0


def scores_of(groups: Sequence[Sequence[Sample]], **overrides: Tensor | None) -> GroupScores:
    """What the scoring pass would say of groups of enumerated samples; valid unless the answer is missing.

    The last token of a reference answer stands for the end of turn.
    """

    def table(read) -> Tensor:
        return torch.tensor([[read(sample) for sample in group] for group in groups])

    valid = table(lambda s: s.answer is not None)
    fields = {
        "answer_logprob": table(lambda s: float(s.answer_logprob)).double(),
        "valid_mask": valid,
        "arrived_mask": torch.ones_like(valid),
        "has_marker": valid,
        "chain_length": table(lambda s: len(s.chain)),
        "answer_length": table(lambda s: s.answer_length),
        "chain_log_ratio": torch.zeros(valid.shape, dtype=torch.float64),
        "ends_mask": table(lambda s: s.answer is not None and not s.own),
        "token_logprobs": torch.stack([torch.stack([s.answer_logprobs for s in group]) for group in groups]),
        "no_chain_logprobs": torch.stack([group[0].no_chain_logprobs for group in groups]),
    }
    return GroupScores(**(fields | overrides))


def batch_update(
    rule: UpdateRule, groups: Sequence[Sequence[Sample]], reference: TabularPolicy | None = None
) -> Tensor:
    """sum_t weight_t grad log pi(token_t) of a batch of prompts: the step of the whole program. [NUM_PARAMETERS]."""
    samples = [sample for group in groups for sample in group]
    reference_logprobs = [_reference_logprobs(sample, reference) for sample in samples]
    log_ratio = [
        float((sample.logprobs - logprobs)[: len(sample.chain)].sum())
        for sample, logprobs in zip(samples, reference_logprobs, strict=True)
    ]
    scores = scores_of(
        groups,
        chain_log_ratio=torch.tensor(log_ratio, dtype=torch.float64).view(len(groups), -1),
        verifiable_reward=torch.tensor([[float(s.own and s.answer == REFERENCE_ANSWER) for s in g] for g in groups]),
        initial_token_logprobs=_answers(groups, reference),
        initial_no_chain_logprobs=_answers_behind_none(groups, reference),
    )
    coefficients = sample_weights(rule, scores)
    tables = (coefficients.policy_weight, coefficients.answer_weight, coefficients.kl_weight, coefficients.end_weight)
    update = torch.zeros(NUM_PARAMETERS, dtype=torch.float64)
    for i, (sample, logprobs) in enumerate(zip(samples, reference_logprobs, strict=True)):
        sequence = SequenceLogprobs(
            chain_length=len(sample.chain),
            answer_length=sample.answer_length,
            own_answer=sample.own,
            policy_logprobs=sample.logprobs,
            reference_logprobs=logprobs,
        )
        entries = [float(table.flatten()[i]) for table in tables]
        slope = None
        if coefficients.answer_slope is not None:
            slope = coefficients.answer_slope.flatten(0, 1)[i, : sample.answer_length]
        update += sequence_weights(rule, sequence, *entries, answer_slope=slope).double() @ sample.gradients
    return update


def _answers(groups: Sequence[Sequence[Sample]], policy: TabularPolicy | None) -> Tensor | None:
    """[P, G, 2] nats of a* behind each chain, by another policy."""
    if policy is None:
        return None
    return torch.stack([torch.stack([policy.answer_logprobs(s.chain).detach() for s in group]) for group in groups])


def _answers_behind_none(groups: Sequence[Sequence[Sample]], policy: TabularPolicy | None) -> Tensor | None:
    """[P, 2] nats of a* behind the bare marker, by another policy."""
    return None if policy is None else torch.stack([policy.answer_logprobs((MARKER,)).detach() for _ in groups])


def _reference_logprobs(sample: Sample, reference: TabularPolicy | None) -> Tensor:
    if reference is None:
        return sample.logprobs
    logprobs = reference.chain_logprobs(sample.chain).detach()
    return torch.cat([logprobs, torch.zeros(sample.answer_length, dtype=torch.float64)])


def all_groups(
    rule: UpdateRule, samples: Sequence[Sample], group_size: int, reference: TabularPolicy | None = None
) -> tuple[Tensor, Tensor]:
    """Probability [groups] and update [groups, NUM_PARAMETERS] of every ordered group of independent samples."""
    groups = list(itertools.product(samples, repeat=group_size))
    probability = torch.stack([torch.stack([s.probability for s in group]).prod() for group in groups])
    return probability, torch.stack([batch_update(rule, [group], reference) for group in groups])


def expected_update(
    rule: UpdateRule, samples: Sequence[Sample], group_size: int, reference: TabularPolicy | None = None
) -> Tensor:
    """E[update], exactly. [NUM_PARAMETERS]."""
    probability, updates = all_groups(rule, samples, group_size, reference)
    return probability @ updates


def reference_answer_samples(policy: TabularPolicy) -> list[Sample]:
    """Every chain, each counted as valid and followed by a*."""
    return [Sample(policy, chain, REFERENCE_ANSWER) for chain in CHAINS]


def marked_samples(policy: TabularPolicy) -> list[Sample]:
    """Every chain; only those that reached the marker are followed by a*."""
    return [Sample(policy, chain, REFERENCE_ANSWER if MARKER in chain else None) for chain in CHAINS]


def own_answer_samples(policy: TabularPolicy) -> list[Sample]:
    """Every chain with every own answer."""
    return [Sample(policy, chain, answer, own=True) for chain in CHAINS for answer in ANSWERS]
