"""What kind of objective is X: the one table that settings, the update and the trainer read. No torch here.

The functions of an objective stand in `nemo_jepo.objective.registry`, its defaults in conf/objective/.
"""

from dataclasses import dataclass
from typing import Literal

RewardKind = Literal["likelihood", "verifier", "verifier_or_likelihood", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveKind:
    """What the rest of the program must know of an objective to serve it."""

    reward: RewardKind = "likelihood"
    """likelihood: of the reference answer behind the sampled chain. verifier: 0/1 of the sample's own answer.
    verifier_or_likelihood: the verifier's for prompts where it rewards a sample. none: nothing is sampled."""
    needs_siblings: bool = False
    """The whole gradient has a leave-one-out baseline: nothing is left of it with one generation a prompt."""
    answer_term: bool = True
    """beta_sup weighs a gradient through the answer's own tokens."""
    sums_tokens: bool = True
    """Its reward is made of l_i, the sum over the answer's tokens, which reward_normalization may turn into a mean."""
    reads_tokens: bool = False
    """Reads the log-prob of each of the answer's tokens."""
    reads_no_chain: bool = False
    """Reads the reference answer without a chain as well: one more segment a prompt."""
    scored_by_initial: bool = False
    """The frozen initial policy scores, not the one that is trained."""
    compares_pairs: bool = False
    """Tells a better sample of a prompt from a worse one (`nemo_jepo.objective.pairs`), whoever drew them."""

    @property
    def supervised(self) -> bool:
        """Trains on targets of the data alone: nothing is sampled or scored."""
        return self.reward == "none"

    @property
    def reads_verifier(self) -> bool:
        """Some prompts may train on the verifier's reward, so own answers must be decoded."""
        return self.reward in ("verifier", "verifier_or_likelihood")

    @property
    def reads_likelihood(self) -> bool:
        """Some prompts may train on the likelihood of the reference answer."""
        return self.reward in ("likelihood", "verifier_or_likelihood")


OBJECTIVES = {
    "jepo": ObjectiveKind(),
    "jepo_single": ObjectiveKind(),
    "rloo": ObjectiveKind(reward="verifier", needs_siblings=True, answer_term=False),
    "jepo_rl": ObjectiveKind(reward="verifier_or_likelihood", needs_siblings=True),
    "verifree": ObjectiveKind(),
    "avg_logprob": ObjectiveKind(sums_tokens=False),
    "gm": ObjectiveKind(sums_tokens=False),
    "rlpr": ObjectiveKind(sums_tokens=False, reads_tokens=True, reads_no_chain=True),
    "r3": ObjectiveKind(sums_tokens=False, reads_tokens=True),
    "nrt": ObjectiveKind(sums_tokens=False, reads_tokens=True, reads_no_chain=True),
    "vr_cli": ObjectiveKind(
        needs_siblings=True,
        answer_term=False,
        sums_tokens=False,
        reads_tokens=True,
        reads_no_chain=True,
        scored_by_initial=True,
    ),
    "sft_sampled_chain": ObjectiveKind(),
    "dpo": ObjectiveKind(reward="verifier_or_likelihood", needs_siblings=True, answer_term=False, compares_pairs=True),
    "sft": ObjectiveKind(reward="none", answer_term=False),
}
"""objective.name -> kind."""

RENAMED_OBJECTIVES = {"prob_pg": "verifree"}
"""Names of earlier versions -> names of today; each is said once and read for one version more."""

REWARDS = ("rule", "hybrid")
REWARD_NORMALIZATIONS = ("none", "answer_tokens")
LOSS_NORMALIZATIONS = ("none", "chain", "sequence", "batch")
NO_CHAIN_POLICIES = ("none", "current", "initial")
PAIR_VALUES = ("likelihood", "score")

FORMAT_LOSSES = ("marker_and_end", "paper", "none")
"""objective.format_loss; the functions stand in `nemo_jepo.objective.format`."""
