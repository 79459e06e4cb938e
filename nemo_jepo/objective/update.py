"""The update as one detached weight per token.

One optimizer step is made per batch of rollouts, right after the batch was scored at the current weights. Every
gradient of the method is then linear in the current log-probs, with coefficients that are known:

    loss = - sum over all tokens of the global batch of  weight_t * log pi(token_t)

Global denominators are inside the weights, so any split over micro-batches, ranks or pipeline stages sums to the same
update. P prompts, G samples per prompt; docs/concepts/objective.md derives each weight.
"""

from collections.abc import Callable

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
    std_from_moments,
)
from nemo_jepo.objective.format import FORMAT_TERMS, FormatTerms
from nemo_jepo.objective.kl import IMPORTANCE_RATIOS, KL_GRADIENTS
from nemo_jepo.objective.records import GroupScores, SampleWeights, Scored, SequenceLogprobs, UpdateRule
from nemo_jepo.objective.registry import LIKELIHOOD_TERMS, uses_verifiable_reward

Reduce = Callable[[Tensor], Tensor]
"""A tensor of this rank -> its sum (or maximum) over data-parallel ranks."""


def only_rank(tensor: Tensor) -> Tensor:
    """The reduction of a run with one data-parallel rank."""
    return tensor


def sample_weights(
    rule: UpdateRule, scores: GroupScores, reduce_sum: Reduce = only_rank, reduce_max: Reduce = only_rank
) -> SampleWeights:
    """Coefficients of every sample of this rank in the global batch's update.

        policy_weight_i = (A~_i * (1/n | 1) / P_mean  +  f A~fmt_i / (n P))  [/ policy tokens]
        answer_weight_i = beta_sup * w_i / P_mean                            [/ answer tokens]
        end_weight_i    = f ends_i / (n P)
        kl_weight_i     = beta / (n P)

    f = format_weight; A~fmt and ends are the terms of format_loss (`nemo_jepo.objective.format`).
    n = arrived samples of the prompt; P = prompts of the global batch with at least one arrived sample; P_mean = P with
    prompt_mean=all, and with valid the number of those with at least one valid sample. With length_normalization=tokens
    the brackets hold, and l_i is a mean over answer tokens throughout. Invalid samples have no part in A~_i and w_i
    but count in n: without scaling this is Eqs. 5 and 7 to the letter where every sample is valid, and only there.

    Args:
        rule: settings.
        scores: this rank's groups, whole groups only.
        reduce_sum: sum over the data-parallel group; called once, on [11] float64 ([2] for sft).
        reduce_max: maximum over the same group; called once, on a scalar, for prob_pg alone.
    Returns:
        SampleWeights.
    Raises:
        ValueError: a valid sample's l_i is not finite; a verifiable objective without verifiable_reward; bad shapes.
    Source: arXiv 2503.19618, App. B.2, Eqs. 5, 7, 10.
    """
    if OBJECTIVES[rule.name].supervised:
        return supervised_weights(rule, scores, reduce_sum)
    verifiable = _verifiable_prompts(rule, scores)
    likelihood_mask, reward_mask = scores.valid_mask & ~verifiable, scores.valid_mask & verifiable
    _require_finite(scores.answer_logprob, likelihood_mask)

    raw, answer_share = _raw_terms(rule, scores, likelihood_mask, reward_mask, reduce_max)
    raw_format, ending = _format_terms(rule, scores)
    has_valid, has_arrived = (mask.any(-1, keepdim=True) for mask in (scores.valid_mask, scores.arrived_mask))
    local = [moments(raw, likelihood_mask), moments(raw, reward_mask), moments(raw_format, scores.arrived_mask)]
    total = reduce_sum(torch.cat([*local, torch.stack([has_valid.sum(), has_arrived.sum()]).double()]))
    std = torch.stack([std_from_moments(part) for part in total[:9].view(3, 3)])

    advantage = torch.where(
        verifiable,
        _post_process(rule, raw, reward_mask, std[1]),
        _post_process(rule, raw, likelihood_mask, std[0]),
    )
    format_advantage = rule.format_weight * _post_process(rule, raw_format, scores.arrived_mask, std[2])
    per_prompt = share(total[10])
    per_mean = per_prompt if rule.prompt_mean == "all" else share(total[9])
    sample_share = scores.arrived_mask * share(scores.arrived_mask.sum(-1, keepdim=True))
    per_sample = sample_share * per_prompt
    rl_share = sample_share if rule.rl_reduction == "mean" else scores.arrived_mask.double()
    policy_tokens, answer_tokens = _token_divisors(rule, scores, verifiable)
    kl_beta = 0.0 if rule.kl_estimator == "k1_reward" else rule.kl_beta
    return SampleWeights(
        policy_weight=(advantage * rl_share * per_mean + format_advantage * per_sample) / policy_tokens,
        answer_weight=rule.beta_sup * answer_share * per_mean / answer_tokens,
        end_weight=rule.format_weight * ending * per_sample,
        kl_weight=kl_beta * per_sample,
        advantage=advantage,
        advantage_std=std,
    )


def supervised_weights(rule: UpdateRule, scores: GroupScores, reduce_sum: Reduce = only_rank) -> SampleWeights:
    """Weights of -log pi(target): the same weight on every chain and answer token. Reads masks and lengths alone.

        none:   mean over prompts of sum_t log pi(target_t)        tokens: mean over all target tokens

    Args:
        rule: settings.
        scores: this rank's targets, usually G = 1; arrived_mask says which count.
        reduce_sum: sum over the data-parallel group; called once, on [2] float64.
    Returns:
        SampleWeights with policy_weight = answer_weight and no KL.
    """
    arrived = scores.arrived_mask
    tokens = ((scores.chain_length + scores.answer_length) * arrived).sum().double()
    total = reduce_sum(torch.stack([arrived.any(-1).sum().double(), tokens]))
    per_prompt = arrived * share(arrived.sum(-1, keepdim=True)) * share(total[0])
    weight = arrived * share(total[1]) if rule.length_normalization == "tokens" else per_prompt
    nothing = torch.zeros_like(weight)
    return SampleWeights(
        policy_weight=weight,
        answer_weight=weight,
        end_weight=nothing,
        kl_weight=nothing,
        advantage=nothing,
        advantage_std=nothing.new_zeros(3),
    )


def _format_terms(rule: UpdateRule, scores: GroupScores) -> FormatTerms:
    """Raw format advantage, and where the end of turn is taught."""
    ends = torch.zeros_like(scores.arrived_mask) if scores.ends_mask is None else scores.ends_mask
    return FORMAT_TERMS[rule.format_loss](scores.has_marker, scores.arrived_mask, ends)


def _verifiable_prompts(rule: UpdateRule, scores: GroupScores) -> Tensor:
    """[P, 1] bool: prompts that train on the verifiable reward."""
    if scores.verifiable_reward is not None:
        return uses_verifiable_reward(rule.name, scores.verifiable_reward).unsqueeze(-1)
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
) -> tuple[Tensor, Tensor]:
    """Advantages before scaling, and the answer weights within each prompt; both [P, G] float64."""
    raw, weight = torch.zeros_like(scores.answer_logprob).double(), torch.zeros_like(scores.answer_logprob).double()
    if OBJECTIVES[rule.name].reads_likelihood:
        raw, weight = _likelihood_terms(rule, scores, likelihood_mask, reduce_max)
    if scores.verifiable_reward is not None:
        raw = raw + leave_one_out_advantage(scores.verifiable_reward.double(), reward_mask)
    if rule.kl_estimator == "k1_reward" and rule.kl_beta > 0:
        raw = raw - _kl_in_reward(rule, scores)
    return raw, weight


def _likelihood_terms(rule: UpdateRule, scores: GroupScores, mask: Tensor, reduce_max: Reduce) -> tuple[Tensor, Tensor]:
    """Raw advantages, and weights of grad l_i within each prompt, where the answer's likelihood scores."""
    terms = LIKELIHOOD_TERMS[rule.name]
    logprob = masked(scores.answer_logprob, mask)
    if rule.length_normalization == "tokens":
        logprob = logprob / scores.answer_length.clamp(min=1)
    if terms.common_scale and rule.normalize:
        logprob = logprob - reduce_max(logprob.masked_fill(~mask, -torch.inf).amax())
    score, slope = (masked(values, mask) for values in terms.score(logprob, scores.answer_length))
    raw = terms.advantage(score, mask)
    if terms.answer_weight is None:
        return raw, torch.zeros_like(raw)
    return raw, terms.answer_weight(score, mask) * slope


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


def _token_divisors(rule: UpdateRule, scores: GroupScores, verifiable: Tensor) -> tuple[Tensor, Tensor]:
    """What length_normalization divides the policy weight and the answer weight by."""
    if rule.length_normalization == "none":
        one = torch.ones_like(scores.chain_length)
        return one, one
    policy_tokens = scores.chain_length + scores.answer_length * (verifiable & scores.valid_mask)
    return policy_tokens.clamp(min=1), scores.answer_length.clamp(min=1)


def token_weights(rule: UpdateRule, scored: Scored, weights: SampleWeights) -> list[Tensor]:
    """The weight of every token's log-prob in the update: the one place where an objective meets tokens.

    Args:
        rule: settings.
        scored: N sequences, ordered by (group, sample), with their log-probs.
        weights: of the same samples.
    Returns:
        N tensors [chain_length + answer_length] float32, detached; loss = -sum(weights * log-probs). Empty for a
        failed sample.
    Raises:
        ValueError: see `sequence_weights`.
    """
    tables = (weights.policy_weight, weights.answer_weight, weights.kl_weight, weights.end_weight)
    samples = zip(*(table.flatten().tolist() for table in tables), strict=True)
    token_weights = []
    for index, (sequence, of_sample) in enumerate(zip(scored.sequences, samples, strict=True)):
        if sequence.failed:
            token_weights.append(torch.zeros(0))
            continue
        logprobs = SequenceLogprobs(
            chain_length=sequence.chain_length,
            answer_length=sequence.answer_length,
            own_answer=sequence.own_answer,
            policy_logprobs=scored.policy.policy_logprobs[index] if scored.policy.policy_logprobs else None,
            reference_logprobs=None if scored.reference is None else scored.reference.policy_logprobs[index],
            generation_logprobs=torch.tensor(sequence.generation_logprobs),
        )
        token_weights.append(sequence_weights(rule, logprobs, *of_sample))
    return token_weights


def sequence_weights(
    rule: UpdateRule,
    sequence: SequenceLogprobs,
    policy_weight: float,
    answer_weight: float,
    kl_weight: float,
    end_weight: float = 0.0,
) -> Tensor:
    """Weight of each token's log-prob in the update.

        chain:             policy_weight * ratio_t - kl_weight * g_t
        own answer:        policy_weight * ratio_t
        reference answer:  answer_weight; answer_weight + end_weight on its last token, which ends the turn

    ratio_t is the importance ratio and g_t the gradient of the KL loss in log pi(c_t).

    Args:
        rule: settings.
        sequence: lengths of one sample, and the log-probs that the rule reads.
        policy_weight: this sample's entry of `SampleWeights`.
        answer_weight: the same.
        kl_weight: the same.
        end_weight: the same.
    Returns:
        [chain_length + answer_length] float32, detached; loss = -(weights * log-probs).sum().
    Raises:
        ValueError: log-probs that the rule reads are missing or of another length.
    """
    chain, total = sequence.chain_length, sequence.chain_length + sequence.answer_length
    num_sampled = total if sequence.own_answer else chain
    weights = torch.full((total,), float(answer_weight), dtype=torch.float64)
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
