"""Rules between the settings of what is maximised, what samples, and who rewards. Called by `config.check`."""

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.judge import RUN_SERVERS, EndpointConfig, check_judge, check_score_judge
from nemo_jepo.config.objectives import OBJECTIVES
from nemo_jepo.config.schema import (
    Config,
    EvaluationConfig,
    HybridConfig,
    KLConfig,
    ObjectiveConfig,
    RolloutConfig,
    TrainerConfig,
)


def check_objective(objective: ObjectiveConfig, kl: KLConfig, rollout: RolloutConfig, trainer: TrainerConfig) -> None:
    """What an objective needs of the other settings, and which of its own have no meaning with it."""
    name, kind = objective.name, objective.kind
    if kind.reads_verifier and rollout.stop_at_marker:
        rule = f"objective={name} reads the generation's own answer, which a sampler that stops there never writes"
        raise ConfigError("rollout.stop_at_marker", True, rule, "Add rollout.stop_at_marker=false")
    if kind.needs_siblings and trainer.jepo.num_generations_per_prompt < 2:
        rule = f"the baseline of objective={name} is the mean of the other generations"
        if kind.compares_pairs:
            rule = f"objective={name} compares two of them"
        raise ConfigError("trainer.jepo.num_generations_per_prompt", 1, rule, "Use at least 2")
    if kind.reads_likelihood and not kind.answer_term and objective.beta_sup:
        rule = f"objective={name} has no supervised term"
        raise ConfigError("objective.beta_sup", objective.beta_sup, rule, "Use 0, or objective=jepo_single")
    if kind.reads_likelihood and not kind.sums_tokens and objective.reward_normalization != "none":
        rule = f"the reward of objective={name} weighs the answer's tokens already"
        raise ConfigError("objective.reward_normalization", objective.reward_normalization, rule, "Use none")
    if kind.scored_by_initial and objective.no_chain != "initial":
        rule = f"objective={name} compares with an answer without a chain under the policy that scores, the initial one"
        raise ConfigError("objective.no_chain", objective.no_chain, rule, "Use initial")
    if kind.reads_no_chain and objective.no_chain == "none":
        rule = f"objective={name} reads the answer without a chain"
        raise ConfigError("objective.no_chain", "none", rule, "Use current or initial")
    if kind.compares_pairs:
        _check_pairs(objective, kl)
    if objective.importance_sampling != "none" and objective.importance_cap < 1:
        rule = "would shrink on-policy tokens, whose ratio is 1"
        raise ConfigError("objective.importance_cap", objective.importance_cap, rule, "Use at least 1")


def _check_pairs(objective: ObjectiveConfig, kl: KLConfig) -> None:
    """What a comparison of two samples leaves no room for."""
    name = objective.name
    if kl.beta:
        rule = f"objective={name} holds on to a reference policy by dpo.beta"
        raise ConfigError("kl.beta", kl.beta, rule, "Use 0")
    given = {
        "format_loss": (objective.format_loss, "none"),
        "loss_normalization": (objective.loss_normalization, "none"),
        "importance_sampling": (objective.importance_sampling, "none"),
    }
    for key, (value, wanted) in given.items():
        if value != wanted:
            rule = f"objective={name} weighs the tokens of two samples alike, and no others"
            raise ConfigError(f"objective.{key}", value, rule, f"Use {wanted}")


def _check_sync_interval(rollout: RolloutConfig) -> None:
    if rollout.sync_interval == 1:
        return
    if rollout.max_staleness:
        rule = "sampling ahead gives its samples the newest weights (rollout.max_staleness)"
        raise ConfigError("rollout.sync_interval", rollout.sync_interval, rule, "Use 1, or rollout.max_staleness=0")
    if rollout.kind.shares_gpus:
        rule = f"servers of rollout={rollout.name} lose their weights while they sleep"
        raise ConfigError("rollout.sync_interval", rollout.sync_interval, rule, "Use 1, or rollout=vllm")


def check_on_policy(objective: ObjectiveConfig, rollout: RolloutConfig) -> None:
    """Samples must be the policy's own, or corrected for, or compared."""
    _check_sync_interval(rollout)
    if objective.kind.supervised or objective.kind.compares_pairs or objective.importance_sampling != "none":
        return
    if rollout.sync_interval != 1:
        rule = f"the samples come from older weights, and nothing in objective={objective.name} corrects for it"
        fix = "Use 1, objective=dpo, or objective.importance_sampling=token_truncated"
        raise ConfigError("rollout.sync_interval", rollout.sync_interval, rule, fix)
    if rollout.temperature != 1:
        rule = "the samples would not be the policy's own, and nothing corrects for it"
        fix = "Use 1, or objective.importance_sampling=token_truncated"
        raise ConfigError("rollout.temperature", rollout.temperature, rule, fix)
    if rollout.max_staleness:
        rule = "the samples come from older weights, and nothing corrects for it"
        fix = "Add objective.importance_sampling=token_truncated (or sequence_truncated)"
        raise ConfigError("rollout.max_staleness", rollout.max_staleness, rule, fix)


def check_evaluation(evaluation: EvaluationConfig, rollout: RolloutConfig, trains: bool) -> None:
    """Who is asked about own answers in an evaluation can be, and what is to be written is."""
    if trains and evaluation.pass_rates is not None:
        rule, fix = "is a file of `nemo-jepo evaluate`, and training writes none", "Leave it out, and evaluate the run"
        raise ConfigError("evaluation.pass_rates", evaluation.pass_rates, rule, fix)
    judges = {"evaluation.judge": evaluation.judge, "evaluation.model_verifier": evaluation.model_verifier}
    for node, judge in judges.items():
        if judge.url is not None and not evaluation.verify:
            rule = "is asked where the verifier calls an own answer wrong, and evaluation.verify=false decodes none"
            raise ConfigError(f"{node}.url", judge.url, rule, "Use evaluation.verify=true, or no judge")
        check_judge(judge, node)
        _check_endpoint(judge, node, rollout)


def _check_endpoint(judge: EndpointConfig, node: str, rollout: RolloutConfig) -> None:
    if judge.url is None:
        return
    if judge.url == RUN_SERVERS and not rollout.kind.has_servers:
        rule = f"are the vLLM servers of the run, and rollout={rollout.name} has none"
        raise ConfigError(f"{node}.url", judge.url, rule, "Give an address, or use rollout=vllm")
    if judge.url == RUN_SERVERS and rollout.kind.shares_gpus:
        rule = f"are the vLLM servers of the run, which sleep when a judge is asked (rollout={rollout.name})"
        raise ConfigError(f"{node}.url", judge.url, rule, "Give an address, or use rollout=vllm")
    judge.key(node)


def check_reward(objective: ObjectiveConfig, hybrid: HybridConfig, rollout: RolloutConfig) -> None:
    """A model rewards own answers where it is asked for, and only there."""
    is_hybrid = objective.reward == "hybrid"
    if is_hybrid and not objective.kind.reads_verifier:
        names = ", ".join(name for name, kind in OBJECTIVES.items() if kind.reads_verifier)
        rule = f"objective={objective.name} does not read the reward of own answers; {names} do"
        raise ConfigError("objective.reward", "hybrid", rule, "Use rule, or one of these")
    if is_hybrid and hybrid.verifier.url is None:
        rule = "objective.reward=hybrid asks a model"
        raise ConfigError("hybrid.verifier.url", None, rule, "Give its address, http://HOST:PORT/v1")
    if not is_hybrid and hybrid.verifier.url is not None:
        rule = "nobody asks it with objective.reward=rule"
        raise ConfigError("hybrid.verifier.url", hybrid.verifier.url, rule, "Add objective.reward=hybrid")
    check_judge(hybrid.verifier, "hybrid.verifier")
    _check_endpoint(hybrid.verifier, "hybrid.verifier", rollout)


def check_pair_scores(config: Config) -> None:
    """A judge scores own answers where pairs are compared by scores, and only there."""
    dpo, name = config.dpo, config.objective.name
    if dpo.unverifiable != "score":
        if dpo.judge.url is not None:
            rule = f"nobody asks it with dpo.unverifiable={dpo.unverifiable}"
            raise ConfigError("dpo.judge.url", dpo.judge.url, rule, "Add dpo.unverifiable=score")
        return
    if not config.objective.kind.compares_pairs:
        rule = f"objective={name} compares no pairs"
        raise ConfigError("dpo.unverifiable", "score", rule, "Use likelihood, or objective=dpo")
    if config.data.verifier == "judgement":
        rule = "asks a judge about answers, and data.verifier=judgement has judgements"
        raise ConfigError("dpo.unverifiable", "score", rule, "Use likelihood")
    if config.self_verification.weight:
        rule = "tells better answers from worse ones, and self_verification.weight right ones from wrong ones"
        raise ConfigError("dpo.unverifiable", "score", rule, "Use likelihood, or self_verification.weight=0")
    if dpo.judge.url is None:
        rule = "dpo.unverifiable=score asks a judge"
        raise ConfigError("dpo.judge.url", None, rule, "Give its address, http://HOST:PORT/v1")
    check_score_judge(dpo.judge, "dpo.judge")
    _check_endpoint(dpo.judge, "dpo.judge", config.rollout)


def check_self_verification(config: Config, trains: bool) -> None:
    """Verdicts on own answers need somebody who knows."""
    objective, verification = config.objective, config.self_verification
    if verification.weight and trains and not objective.kind.reads_verifier:
        names = ", ".join(name for name, kind in OBJECTIVES.items() if kind.reads_verifier)
        rule = f"objective={objective.name} knows no right and wrong of own answers; {names} do"
        raise ConfigError("self_verification.weight", verification.weight, rule, "Use 0, or one of these")
    if verification.weight and not config.evaluation.verify:
        rule = "weighs own answers, and evaluation.verify=false decodes none"
        raise ConfigError("self_verification.weight", verification.weight, rule, "Use evaluation.verify=true, or 0")
