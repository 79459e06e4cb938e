"""The settings of what is maximised, and how: objective, pairs, own verdicts, advantages, refills, KL.

Part of the schema, see `config.schema`.
"""

from dataclasses import dataclass, field

from nemo_jepo.config.judge import ScoreJudgeConfig, score_judge_config
from nemo_jepo.config.objectives import (
    FORMAT_LOSSES,
    LOSS_NORMALIZATIONS,
    NO_CHAIN_POLICIES,
    OBJECTIVES,
    PAIR_VALUES,
    REWARD_NORMALIZATIONS,
    REWARDS,
    ObjectiveKind,
)
from nemo_jepo.config.rules import setting

SFT_TARGETS = ("answer", "marked_answer", "chain_of_thought")


@dataclass(kw_only=True, slots=True)
class ObjectiveConfig:
    """What is maximised (config group `objective=`; docs/concepts/objective.md)."""

    name: str = setting("jepo", choices=tuple(OBJECTIVES))
    """Which objective: a line of config/objectives.py and a file of conf/objective/."""
    reward: str = setting("rule", choices=REWARDS)
    """What own answers earn, for rloo and jepo_rl. rule: the verdict of data.verifier. hybrid: where that is wrong, the
    verdict of a model (hybrid.verifier)."""
    beta_sup: float = setting(1.0, ge=0)
    """Weight of the supervised term, the gradient of the bound through the answer's log-prob."""
    rl_reduction: str = setting("mean", choices=("mean", "sum"))
    """mean: 1/n over a prompt's samples, as App. B.2 and Eq. 5; sum: no 1/n, as Eq. 7. To the letter where all
    samples are valid and advantage.normalize=false."""
    reward_normalization: str = setting("none", choices=REWARD_NORMALIZATIONS)
    """What l_i, the reference answer's log-prob, is divided by before anything is made of it. none: it is a sum, as in
    every bound of the paper; answer_tokens: their number, which makes it another objective (App. B.2 warns of it)."""
    loss_normalization: str = setting("none", choices=LOSS_NORMALIZATIONS)
    """What each sample's log-probs are divided by in the update. none: nothing; chain: the chain's by their number, the
    answer's by theirs; sequence: all by their number; batch: by the batch's mean number, so that tokens weigh alike."""
    no_chain: str = setting("none", choices=NO_CHAIN_POLICIES)
    """The reference answer behind the bare marker, scored beside the samples (one segment more a prompt). none: never;
    current: by the policy; initial: what the objective reads of it is the frozen initial policy's. chain_gain shows."""
    format_loss: str = setting("marker_and_end", choices=FORMAT_LOSSES)
    """paper: a generation without the marker has a format reward of -10 (App. B.2). marker_and_end: that, and the
    end-of-turn token behind the reference answer is taught, which nothing that is sampled shows. none: neither."""
    format_weight: float = setting(1.0, ge=0)
    """Weight of the format loss; on its reward after scaling and clipping."""
    importance_sampling: str = setting("none", choices=("none", "token_truncated", "sequence_truncated"))
    """Corrects the policy-gradient term for a lagging sampler, by a truncated ratio of each token or each sequence."""
    importance_cap: float = setting(2.0, ge=0)
    """Largest importance ratio."""
    sft_target: str = setting("answer", choices=SFT_TARGETS)
    """For sft: answer (-log pi(a*|x)), marked_answer (marker and answer, so that own answers can be found and scored as
    those of other objectives) or chain_of_thought (golden chain of thought, marker and answer)."""

    @property
    def kind(self) -> ObjectiveKind:
        """What the table of objectives says of this one."""
        return OBJECTIVES[self.name]


@dataclass(kw_only=True, slots=True)
class DPOConfig:
    """What objective=dpo compares, and with what (docs/guides/dpo.md)."""

    beta: float = setting(0.1, gt=0, fix="Use 0.1")
    """How strong a preference is asked for: loss -log sigmoid(beta * margin of log-ratios to the reference policy)."""
    sync_reference: bool = True
    """The reference policy gets the weights of every sync (rollout.sync_interval), as the sampler does. False: it stays
    the initial policy."""
    reject_longest: bool = False
    """Reject the longest of the samples that are worse than the chosen one, not the worst: against growing answers."""
    unverifiable: str = setting("likelihood", choices=PAIR_VALUES)
    """What compares the samples of a prompt where no verifier rewards one. likelihood: that of the reference answer.
    score: a judge's, of the own answer (dpo.judge)."""
    judge: ScoreJudgeConfig = field(default_factory=score_judge_config)


@dataclass(kw_only=True, slots=True)
class SelfVerificationConfig:
    """A verdict on its own answer that the policy learns beside rloo, jepo_rl or dpo."""

    weight: float = setting(0.0, ge=0)
    """lambda: weight of log pi(verdict | chain, own answer, question), mean over samples and prompts; 0: none is asked
    for. An evaluation with more than 0 weighs its samples by them (best_at_j, weighted_maj_at_j)."""
    question: str = "\nIs this answer correct?"
    """What stands behind the own answer."""
    yes: str = " Yes"
    """The verdict on an answer whose reward is 1."""
    no: str = " No"
    """The verdict on any other."""


@dataclass(kw_only=True, slots=True)
class AdvantageConfig:
    """Post-processing of raw advantages (App. B.2): clip(A / std(A), -clip, clip), no mean subtraction."""

    normalize: bool = True
    """False: the raw advantage, neither scaled nor clipped."""
    clip: float = setting(1.0, gt=0, fix="Use 1.0, or advantage.normalize=false")
    """Largest absolute value of an advantage."""
    std_scope: str = setting("batch", choices=("batch", "group"))
    """batch: std over every valid sample of the global batch; group: over the prompt's samples."""
    prompt_mean: str = setting("all", choices=("all", "valid"))
    """What the RL and the supervised term are averaged over. all: prompts that arrived, so that one without a valid
    sample adds 0; valid: prompts with a valid sample, so that a lone one takes the weight of the whole batch."""


@dataclass(kw_only=True, slots=True)
class RefillConfig:
    """Dynamic sampling: prompts whose samples are alike leave the batch, newly sampled ones take their place."""

    max_batches: int = setting(1, ge=1)
    """Most batches of prompts that one update draws; 1: prompts are never dropped."""
    ratio: float = setting(0.5, ge=0)
    """A prompt stays whose reward's std over its samples is at least so much of the mean std; 0: not 0."""
    exponential_mean: float = setting(0.99, ge=0, le=1)
    """What one step keeps of that mean; 0: the last step's alone."""
    statistics_from: int = setting(6, ge=1)
    """The first step that counts in it."""
    first_step: int = setting(11, ge=1)
    """The first step that drops prompts."""


@dataclass(kw_only=True, slots=True)
class KLConfig:
    """The pull towards the frozen initial policy, over the chain of thought."""

    beta: float = setting(1e-3, ge=0)
    """Weight of the pull; 0 skips the reference policy altogether."""
    estimator: str = setting("k2_token", choices=("k2_token", "k2_sequence", "k3_token", "k1_reward"))
    """k2_token, k2_sequence, k3_token (losses) or k1_reward; docs/concepts/objective.md derives their gradients."""
