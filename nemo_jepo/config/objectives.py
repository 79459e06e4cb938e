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
    mean_over_tokens: bool = False
    """Its score is a mean over the answer's tokens already, so length_normalization=tokens would divide twice."""
    no_chain_score: bool = False
    """Reads the reference answer's log-prob without a chain: one more segment a prompt."""

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
    "vr_cli": ObjectiveKind(needs_siblings=True, answer_term=False),
    "prob_pg": ObjectiveKind(),
    "avg_logprob": ObjectiveKind(mean_over_tokens=True),
    "sft": ObjectiveKind(reward="none", answer_term=False),
}
"""objective.name -> kind."""

FORMAT_LOSSES = ("marker_and_end", "paper", "none")
"""objective.format_loss; the functions stand in `nemo_jepo.objective.format`."""
