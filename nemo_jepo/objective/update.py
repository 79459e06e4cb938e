"""The update as one detached weight per token.

One optimizer step is made per batch of rollouts, right after the batch was scored at the current weights. Every
gradient of the method is then linear in the current log-probs, with coefficients that are known:

    loss = - sum over all tokens of the global batch of  weight_t * log pi(token_t)

Global denominators are inside the weights, so any split over micro-batches, ranks or pipeline stages sums to the same
update. P prompts, G samples per prompt; docs/concepts/objective.md derives each weight.
"""

from dataclasses import replace

import torch
from torch import Tensor

from nemo_jepo.config.objectives import OBJECTIVES
from nemo_jepo.objective.estimators import (
    group_std,
    leave_one_out_advantage,
    masked,
    moments,
    scale_and_clip,
    share,
    share_of_prompt,
    std_from_moments,
)
from nemo_jepo.objective.format import FORMAT_TERMS, FormatTerms
from nemo_jepo.objective.kl import IMPORTANCE_RATIOS, KL_GRADIENTS
from nemo_jepo.objective.likelihood import AnswerLikelihood
from nemo_jepo.objective.pairs import pair_weights
from nemo_jepo.objective.records import (
    GroupScores,
    Reduce,
    SampleWeights,
    Scored,
    SequenceLogprobs,
    UpdateRule,
    only_rank,
)
from nemo_jepo.objective.registry import LIKELIHOOD_TERMS, uses_verifiable_reward
from nemo_jepo.types import Spliced


def sample_weights(
    rule: UpdateRule, scores: GroupScores, reduce_sum: Reduce = only_rank, reduce_max: Reduce = only_rank
) -> SampleWeights:
    """Coefficients of every sample of this rank in the global batch's update.

        policy_weight_i = (A~_i * (1/n | 1) / P_mean  +  f A~fmt_i / (n P)) / policy tokens
        answer_weight_i = beta_sup * w_i / P_mean / answer tokens          times answer_slope_it where there is one
        end_weight_i    = f ends_i / (n P)
        verdict_weight_i = lambda / (n P)                           where self_verification asks for one
        kl_weight_i     = beta / (n P)

    A~ and w come from the reward of the objective, w with its slope (`nemo_jepo.objective.likelihood`).
    f = format_weight; A~fmt and ends are the terms of format_loss (`nemo_jepo.objective.format`).
    n = arrived samples of the prompt; P = prompts of the global batch with at least one arrived sample; P_mean = P with
    prompt_mean=all, and with valid the number of those with at least one valid sample. The tokens that divide are those
    of loss_normalization, 1 with none. Invalid samples have no part in A~_i and w_i but count in n: without scaling
    this is Eqs. 5 and 7 to the letter where every sample is valid, and only there.

    Args:
        rule: settings.
        scores: this rank's groups, whole groups only.
        reduce_sum: sum over the data-parallel group; called once, on [13] float64 ([3] for sft, [2] for dpo).
        reduce_max: maximum over the same group; called once, on a scalar, for verifree alone.
    Returns:
        SampleWeights.
    Raises:
        ValueError: a valid sample's l_i is not finite; a verifiable objective without verifiable_reward; tables that
            the reward reads are missing; bad shapes.
    Source: arXiv 2503.19618, App. B.2, Eqs. 5, 7, 10.
    """
    if OBJECTIVES[rule.name].supervised:
        return supervised_weights(rule, scores, reduce_sum)
    verifiable = verifiable_prompts(rule, scores)
    likelihood_mask, reward_mask = scores.valid_mask & ~verifiable, scores.valid_mask & verifiable
    _require_finite(scores.answer_logprob, likelihood_mask)
    if OBJECTIVES[rule.name].compares_pairs:
        return pair_weights(rule, scores, verifiable, reduce_sum)

    raw, answer_share, answer_slope = _raw_terms(rule, scores, likelihood_mask, reward_mask, reduce_max)
    raw_format, ending = _format_terms(rule, scores)
    has_valid, has_arrived = (mask.any(-1, keepdim=True) for mask in (scores.valid_mask, scores.arrived_mask))
    local = [moments(raw, likelihood_mask), moments(raw, reward_mask), moments(raw_format, scores.arrived_mask)]
    counts = [has_valid.sum(), has_arrived.sum(), scores.arrived_mask.sum(), _target_tokens(scores).sum()]
    total = reduce_sum(torch.cat([*local, torch.stack(counts).double()]))
    std = torch.stack([std_from_moments(part) for part in total[:9].view(3, 3)])

    advantage = torch.where(
        verifiable,
        _post_process(rule, raw, reward_mask, std[1]),
        _post_process(rule, raw, likelihood_mask, std[0]),
    )
    format_advantage = rule.format_weight * _post_process(rule, raw_format, scores.arrived_mask, std[2])
    per_prompt = share(total[10])
    per_mean = per_prompt if rule.prompt_mean == "all" else share(total[9])
    of_prompt = share_of_prompt(scores.arrived_mask)
    per_sample = of_prompt * per_prompt
    rl_share = of_prompt if rule.rl_reduction == "mean" else scores.arrived_mask.double()
    policy_tokens, answer_tokens = _token_divisors(rule, scores, verifiable, total[12] * share(total[11]))
    kl_beta = 0.0 if rule.kl_estimator == "k1_reward" else rule.kl_beta
    return SampleWeights(
        policy_weight=(advantage * rl_share * per_mean + format_advantage * per_sample) / policy_tokens,
        answer_weight=rule.beta_sup * answer_share * per_mean / answer_tokens,
        end_weight=rule.format_weight * ending * per_sample,
        kl_weight=kl_beta * per_sample,
        advantage=advantage,
        advantage_std=std,
        answer_slope=answer_slope,
        verdict_weight=rule.verdict_weight * per_sample if rule.verdict_weight else None,
    )


def reward_spread(rule: UpdateRule, scores: GroupScores) -> Tensor:
    """How much the samples of each prompt differ in what they are worth: the std of the raw reward, unscaled.

    Args:
        rule: settings.
        scores: this rank's groups.
    Returns:
        [P] in the reward's unit, population std over valid samples; 0 with fewer than two.
    """
    verifiable = verifiable_prompts(rule, scores)
    mask = scores.valid_mask
    value = torch.zeros_like(scores.answer_logprob).double()
    if OBJECTIVES[rule.name].compares_pairs:
        value = scores.answer_logprob.double()
    elif OBJECTIVES[rule.name].reads_likelihood:
        answer = _answer_likelihood(rule, scores, mask & ~verifiable)
        value = LIKELIHOOD_TERMS[rule.name].reward(answer).value.double()
    if scores.verifiable_reward is not None:
        value = torch.where(verifiable, scores.verifiable_reward.double(), value)
    return group_std(value, mask).squeeze(-1)


def supervised_weights(rule: UpdateRule, scores: GroupScores, reduce_sum: Reduce = only_rank) -> SampleWeights:
    """Weights of -log pi(target), chain and answer. Reads masks and lengths alone.

        mean over prompts of sum_t log pi(target_t) / tokens,  by loss_normalization
            none: 1      sequence: of the target      batch: of the batch's mean target, so the mean over all tokens
            chain: of the chain, and of the answer, each sum by its own

    Args:
        rule: settings.
        scores: this rank's targets, usually G = 1; arrived_mask says which count.
        reduce_sum: sum over the data-parallel group; called once, on [3] float64.
    Returns:
        SampleWeights without KL.
    """
    arrived = scores.arrived_mask
    total = reduce_sum(torch.stack([arrived.any(-1).sum(), arrived.sum(), _target_tokens(scores).sum()]).double())
    weight = share_of_prompt(arrived) * share(total[0])
    own_answers = torch.zeros_like(arrived[:, :1])
    chain_tokens, answer_tokens = _token_divisors(rule, scores, own_answers, total[2] * share(total[1]))
    nothing = torch.zeros_like(weight)
    return SampleWeights(
        policy_weight=weight / chain_tokens,
        answer_weight=weight / answer_tokens,
        end_weight=nothing,
        kl_weight=nothing,
        advantage=nothing,
        advantage_std=nothing.new_zeros(3),
    )


def _format_terms(rule: UpdateRule, scores: GroupScores) -> FormatTerms:
    """Raw format advantage, and where the end of turn is taught."""
    ends = torch.zeros_like(scores.arrived_mask) if scores.ends_mask is None else scores.ends_mask
    return FORMAT_TERMS[rule.format_loss](scores.has_marker, scores.arrived_mask, ends)


def verifiable_prompts(rule: UpdateRule, scores: GroupScores) -> Tensor:
    """[P, 1] bool: prompts that train on the verifiable reward."""
    if scores.verifiable_reward is not None:
        return uses_verifiable_reward(rule.name, scores.verifiable_reward, rule.unverifiable).unsqueeze(-1)
    if OBJECTIVES[rule.name].reads_verifier:
        raise ValueError(f"objective {rule.name} needs verifiable_reward")
    return torch.zeros_like(scores.valid_mask[:, :1])


def _require_finite(answer_logprob: Tensor, mask: Tensor) -> None:
    bad = mask & ~torch.isfinite(answer_logprob)
    if bool(bad.any()):
        group, sample = bad.nonzero()[0].tolist()
        value = answer_logprob[group, sample]
        raise ValueError(f"answer_logprob of valid sample {sample} of group {group} is {value}: the scoring pass broke")


def _raw_terms(
    rule: UpdateRule, scores: GroupScores, likelihood_mask: Tensor, reward_mask: Tensor, reduce_max: Reduce
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Advantages before scaling and the answer weights within each prompt, [P, G] float64; and slopes by token."""
    raw, weight = torch.zeros_like(scores.answer_logprob).double(), torch.zeros_like(scores.answer_logprob).double()
    slope: Tensor | None = None
    if OBJECTIVES[rule.name].reads_likelihood:
        raw, weight, slope = _likelihood_terms(rule, scores, likelihood_mask, reduce_max)
    if scores.verifiable_reward is not None:
        raw = raw + leave_one_out_advantage(scores.verifiable_reward.double(), reward_mask)
    if rule.kl_estimator == "k1_reward" and rule.kl_beta > 0:
        raw = raw - _kl_in_reward(rule, scores)
    return raw, weight, slope


def _likelihood_terms(
    rule: UpdateRule, scores: GroupScores, mask: Tensor, reduce_max: Reduce
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Raw advantages, and weights of the answers' gradients within each prompt, where the answer's likelihood scores.

    A slope that is the same for all tokens of an answer is in its weight; one of each token stays beside it.
    """
    terms, answer = LIKELIHOOD_TERMS[rule.name], _answer_likelihood(rule, scores, mask)
    if terms.common_scale and rule.normalize:
        largest = reduce_max(answer.logprob.masked_fill(~mask, -torch.inf).amax())
        answer = replace(answer, logprob=masked(answer.logprob - largest, mask))
    value, slope = terms.reward(answer)
    value = masked(value, mask)
    raw = terms.advantage(value, mask)
    if terms.answer_weight is None:
        return raw, torch.zeros_like(raw), None
    weight = terms.answer_weight(value, mask)
    if rule.reward_normalization == "answer_tokens":
        weight = weight / answer.token_count
    return (raw, weight * masked(slope, mask), None) if slope.ndim == 2 else (raw, weight, slope)


def _answer_likelihood(rule: UpdateRule, scores: GroupScores, mask: Tensor) -> AnswerLikelihood:
    """What the objective's reward reads of the tables, by the policy that it has score."""
    kind = OBJECTIVES[rule.name]
    by_initial = kind.scored_by_initial
    tokens = scores.initial_token_logprobs if by_initial else scores.token_logprobs
    no_chain = scores.initial_no_chain_logprobs if rule.no_chain == "initial" else scores.no_chain_logprobs
    for needed, found, what in ((kind.reads_tokens, tokens, "tokens"), (kind.reads_no_chain, no_chain, "no chain")):
        if needed and found is None:
            raise ValueError(f"objective {rule.name} reads the answer's log-probs ({what}), which were not scored")
    answer = AnswerLikelihood(
        logprob=masked(scores.answer_logprob, mask),
        length=scores.answer_length,
        valid_mask=mask,
        token_logprobs=tokens if kind.reads_tokens else None,
        no_chain_logprobs=no_chain if kind.reads_no_chain else None,
    )
    if rule.reward_normalization == "answer_tokens":
        return replace(answer, logprob=answer.logprob / answer.token_count)
    return replace(answer, logprob=answer.tokens.sum(-1)) if by_initial else answer


def _kl_in_reward(rule: UpdateRule, scores: GroupScores) -> Tensor:
    """beta times the leave-one-out log-ratio, on the arrived samples of prompts that have a valid one.

    E[(k_i - mean_{j != i} k_j) grad log pi(c_i)] = grad KL, because k = sum_t r_t has E[grad k] = E[grad log pi] = 0.
    With rl_reduction=sum the RL term lacks the 1/n that a mean over samples needs, so it is put here.
    """
    arrived = scores.arrived_mask
    scope = arrived & scores.valid_mask.any(-1, keepdim=True)
    log_ratio = leave_one_out_advantage(scores.chain_log_ratio.double(), scope)
    return rule.kl_beta * (
        log_ratio * share(arrived.sum(-1, keepdim=True)) if rule.rl_reduction == "sum" else log_ratio
    )


def _post_process(rule: UpdateRule, raw: Tensor, mask: Tensor, batch_std: Tensor) -> Tensor:
    if not rule.normalize:
        return raw
    return scale_and_clip(raw, group_std(raw, mask) if rule.std_scope == "group" else batch_std, rule.clip)


def _target_tokens(scores: GroupScores) -> Tensor:
    """[P, G]: tokens of each arrived sample's chain and answer."""
    return (scores.chain_length + scores.answer_length) * scores.arrived_mask


def _token_divisors(
    rule: UpdateRule, scores: GroupScores, verifiable: Tensor, mean_tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """What loss_normalization divides the weight of sampled tokens and that of the reference answer's by.

    Args:
        verifiable: [P, 1] bool: prompts whose own answers were sampled with the chain.
        mean_tokens: of chain and answer, over the arrived samples of the global batch.
    """
    one, both = torch.ones_like(scores.chain_length), (scores.chain_length + scores.answer_length).clamp(min=1)
    if rule.loss_normalization == "sequence":
        return both, both
    if rule.loss_normalization == "batch":
        return one * mean_tokens.clamp(min=1), one * mean_tokens.clamp(min=1)
    if rule.loss_normalization == "chain":
        sampled = scores.chain_length + scores.answer_length * (verifiable & scores.valid_mask)
        return sampled.clamp(min=1), scores.answer_length.clamp(min=1)
    return one, one


def token_weights(rule: UpdateRule, scored: Scored, weights: SampleWeights) -> list[Tensor]:
    """The weight of every token's log-prob in the update: the one place where an objective meets tokens.

    Args:
        rule: settings.
        scored: N sequences, ordered by (group, sample), with their log-probs.
        weights: of the same samples.
    Returns:
        Tensors [chain_length + answer_length] float32, detached; loss = -sum(weights * log-probs). Where a sequence has
        a verdict, zeros for its question and verdict_weight for the verdict follow. Empty for a failed sample. Behind
        the N sequences' those of the sequences without a chain, which nothing trains: zeros.
    Raises:
        ValueError: see `sequence_weights`.
    """
    tables = (weights.policy_weight, weights.answer_weight, weights.kl_weight, weights.end_weight)
    samples = zip(*(table.flatten().tolist() for table in tables), strict=True)
    slopes = None if weights.answer_slope is None else weights.answer_slope.flatten(0, 1)
    token_weights = []
    for index, (sequence, (policy, answer, kl, end)) in enumerate(zip(scored.sequences, samples, strict=True)):
        if sequence.failed:
            token_weights.append(torch.zeros(0))
            continue
        sampled = slice(sequence.chain_length + sequence.answer_length)
        logprobs = SequenceLogprobs(
            chain_length=sequence.chain_length,
            answer_length=sequence.answer_length,
            own_answer=sequence.own_answer,
            policy_logprobs=scored.policy.policy_logprobs[index][sampled] if scored.policy.policy_logprobs else None,
            reference_logprobs=None if scored.reference is None else scored.reference.policy_logprobs[index][sampled],
            generation_logprobs=torch.tensor(sequence.generation_logprobs),
        )
        slope = None if slopes is None else slopes[index, : sequence.answer_length]
        of_tokens = sequence_weights(rule, logprobs, policy, answer, kl, end, slope)
        if sequence.verdict is not None:
            of_tokens = torch.cat([of_tokens, _verdict_weights(sequence, weights)])
        token_weights.append(of_tokens)
    untrained = scored.batch.no_chain or ()
    return token_weights + [torch.zeros(sequence.chain_length + sequence.answer_length) for sequence in untrained]


def _verdict_weights(sequence: Spliced, weights: SampleWeights) -> Tensor:
    """[question_length + verdict_length]: the question is read, the verdict is learnt."""
    of_verdict = torch.zeros(sequence.question_length + sequence.verdict_length)
    if weights.verdict_weight is not None:
        of_verdict[sequence.question_length :] = weights.verdict_weight[sequence.group, sequence.sample]
    return of_verdict


def sequence_weights(
    rule: UpdateRule,
    sequence: SequenceLogprobs,
    policy_weight: float,
    answer_weight: float,
    kl_weight: float,
    end_weight: float = 0.0,
    answer_slope: Tensor | None = None,
) -> Tensor:
    """Weight of each token's log-prob in the update.

        chain:             policy_weight * ratio_t - kl_weight * g_t
        own answer:        policy_weight * ratio_t
        reference answer:  answer_weight * slope_t; and end_weight more on its last token, which ends the turn

    ratio_t is the importance ratio and g_t the gradient of the KL loss in log pi(c_t).

    Args:
        rule: settings.
        sequence: lengths of one sample, and the log-probs that the rule reads.
        policy_weight: this sample's entry of `SampleWeights`.
        answer_weight: the same.
        kl_weight: the same.
        end_weight: the same.
        answer_slope: [answer_length], this sample's of the same; None: 1.
    Returns:
        [chain_length + answer_length] float32, detached; loss = -(weights * log-probs).sum().
    Raises:
        ValueError: log-probs that the rule reads are missing or of another length.
    """
    chain, total = sequence.chain_length, sequence.chain_length + sequence.answer_length
    num_sampled = total if sequence.own_answer else chain
    weights = torch.full((total,), float(answer_weight), dtype=torch.float64)
    if answer_slope is not None:
        weights[chain:] *= answer_slope
    weights[total - 1 :] += float(end_weight)
    weights[:num_sampled] = float(policy_weight)
    if rule.importance_sampling != "none":
        policy = _required("policy_logprobs", sequence.policy_logprobs, total)[:num_sampled]
        generation = _required("generation_logprobs", sequence.generation_logprobs, num_sampled)
        weights[:num_sampled] *= IMPORTANCE_RATIOS[rule.importance_sampling](policy, generation, rule.importance_cap)
    if kl_weight:
        policy = _required("policy_logprobs", sequence.policy_logprobs, total)
        log_ratio = policy - _required("reference_logprobs", sequence.reference_logprobs, total)
        weights[:chain] -= float(kl_weight) * KL_GRADIENTS[rule.kl_estimator](log_ratio[:chain])
    return weights.float()


def _required(name: str, logprobs: Tensor | None, length: int) -> Tensor:
    """Log-probs that the rule reads, detached, in float64."""
    if logprobs is None or logprobs.shape != (length,):
        got = "nothing" if logprobs is None else f"shape {list(logprobs.shape)}"
        raise ValueError(f"{name}: the rule reads [{length}] log-probs of this sequence, got {got}")
    return logprobs.detach().double()
