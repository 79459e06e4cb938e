"""What a step shows of its prompts, for an order that follows it (data.drop_easy, data.sampler=learning_progress).

    pass rate   mean over the arrived samples of    1 or 0, by the verifier     where it reads own answers
                                                    exp(l_i / answer tokens)    elsewhere; 0 where not valid
    spread      std of the raw reward over the valid samples (`reward_spread`)

P prompts of this replica. A prompt that refill drops has been sampled all the same, and shows what it shows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_jepo.actor.parallel import Layout
from nemo_jepo.data.stream import Shown
from nemo_jepo.objective.records import GroupScores, UpdateRule
from nemo_jepo.objective.registry import uses_verifiable_reward
from nemo_jepo.objective.update import reward_spread
from nemo_jepo.types import Prompt


class Lessons:
    """What the batches of the step at hand have shown so far, on this replica."""

    def __init__(self, rule: UpdateRule, layout: Layout) -> None:
        self._rule = rule
        self._layout = layout
        self._noted: list[Tensor] = []

    def note(self, prompts: Sequence[Prompt], groups: GroupScores) -> None:
        """Take down one batch.

        Args:
            prompts: P, this replica's.
            groups: their samples' scores.
        """
        by_verifier = verified(self._rule, prompts, groups)
        spread = reward_spread(self._rule, groups).double()
        spread = spread.masked_fill(~groups.arrived_mask.any(-1), torch.nan)
        self._noted.append(torch.stack([pass_rate(groups, by_verifier), spread], dim=-1))

    def take(self) -> list[Shown]:
        """All of it, of all replicas, in the order of the global batches; the same on every rank, and all call."""
        mine, place = torch.stack(self._noted), self._layout.data_parallel_rank
        table = mine.new_zeros(len(mine), self._layout.data_parallel_size, *mine.shape[1:])
        table[:, place] = mine
        self._noted = []
        everything = self._layout.sum_over_data_parallel(table).flatten(0, 2)
        return [Shown(*numbers) for numbers in self._layout.share_over_world(everything.tolist())]


def verified(rule: UpdateRule, prompts: Sequence[Prompt], groups: GroupScores) -> Tensor:
    """[P] bool: prompts whose own answers a verifier has read, and can tell."""
    if groups.verifiable_reward is None:
        return torch.zeros(len(prompts), dtype=torch.bool)
    verifiable = torch.tensor([prompt.verifiable for prompt in prompts], dtype=torch.bool)
    return verifiable | uses_verifiable_reward(rule.name, groups.verifiable_reward, rule.unverifiable)


def pass_rate(groups: GroupScores, by_verifier: Tensor) -> Tensor:
    """How well the policy answers each prompt.

    Args:
        groups: scores.
        by_verifier: [P] bool, whose own answers a verifier has read.
    Returns:
        [P] float64 from 0 to 1, detached; NaN where no sample arrived.
    """
    per_token = groups.answer_logprob.double() / groups.answer_length.clamp(min=1)
    right = torch.where(groups.valid_mask, per_token.exp(), 0.0)
    if groups.verifiable_reward is not None:
        verdict = groups.verifiable_reward.double().nan_to_num(0.0)
        right = torch.where(by_verifier.unsqueeze(-1), verdict, right)
    arrived = groups.arrived_mask
    return (torch.where(arrived, right, 0.0).sum(-1) / arrived.sum(-1)).detach()
