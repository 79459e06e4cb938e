"""Dynamic sampling: a prompt whose samples are alike teaches nothing and leaves the batch, another takes its place.

    s_p    std of the raw reward over the valid samples of prompt p; 0 with fewer than two
    keep   s_p > 0  and  s_p >= ratio * S
    S      exponential mean over steps of the mean s_p of a step's first batch

A prompt stays with all its samples or goes with all of them, so that its baseline stays that of its group. Whole
batches are drawn until the step is full, or max_batches are drawn and it is smaller. What was dropped counts as taken
from the data, and what was kept beyond a full batch is dropped as well.

Source: arXiv 2506.18254 (RLPR), Section 3.3: ratio 0.5, exponential mean 0.99, statistics from step 6, dropping from
step 11. Where rewards are 0 or 1 and ratio is 0, it is the dynamic sampling of arXiv 2503.14476 (DAPO).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_jepo.actor.actor import MegatronJEPOActor
from nemo_jepo.actor.parallel import Layout
from nemo_jepo.actor.scoring import assembled
from nemo_jepo.config.schema import RefillConfig
from nemo_jepo.data.packing import pack
from nemo_jepo.objective.records import GroupScores, Scored
from nemo_jepo.types import Pair, Prompt, Rollout


class Sampled(NamedTuple):
    """Prompts of this replica, their samples, and what was scored; `group` of the latter two indexes the first."""

    prompts: Sequence[Prompt]
    rollouts: list[Rollout]
    scored: Scored


@dataclass(slots=True)
class Refill:
    """Which prompts stay, by the statistics of the run so far; the same on every rank."""

    settings: RefillConfig
    mean_spread: float = 0.0
    """S; 0 before any statistics."""
    num_statistics: int = 0
    """Steps that S was made of."""
    num_batches: int = 1
    """Drawn in the step at hand."""
    num_drawn: int = 0
    """Prompts of this replica that the step at hand drew."""
    num_dropped: int = 0
    """Those of them that it dropped."""

    def drops(self, step: int) -> bool:
        """Whether prompts are dropped after so many optimizer steps."""
        return step + 1 >= self.settings.first_step

    def fill(
        self,
        first: Sampled,
        draw: Callable[[int], Sampled],
        spread_of: Callable[[GroupScores], Tensor],
        actor: MegatronJEPOActor,
        layout: Layout,
        step: int,
    ) -> Sampled:
        """The batch of one update; all ranks call.

        Args:
            first: the step's first batch, whole groups.
            draw: number of batches drawn before -> the next one of this step.
            spread_of: tables -> [P] s_p.
            step: optimizer steps done.
        """
        size = self.num_drawn = len(first.prompts)
        self.num_batches, self.num_dropped = 1, 0
        spread = self._read(first, spread_of, layout, step)
        if not self.drops(step):
            return first
        more, kept, room = first, [], size * layout.data_parallel_size
        while True:
            fresh = self._kept(spread)
            mine, taken = _places(len(fresh), room, layout)
            kept += [(more, group) for group in fresh[:mine]]
            room -= taken
            if not room or self.num_batches == self.settings.max_batches:
                break
            more = draw(self.num_batches)
            spread = spread_of(more.scored.groups)
            self.num_batches += 1
        self.num_drawn = size * self.num_batches
        self.num_dropped = self.num_drawn - len(kept)
        return _assembled(kept, first, actor)

    def metrics(self) -> dict[str, Pair]:
        """Of the step at hand."""
        return {
            "filtered_rate": (float(self.num_dropped), float(self.num_drawn)),
            "refill_rounds": (float(self.num_batches - 1), 1.0),
            "mean_reward_spread": (self.mean_spread, 1.0),
        }

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {"mean_spread": self.mean_spread, "num_statistics": self.num_statistics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.mean_spread, self.num_statistics = state["mean_spread"], state["num_statistics"]

    def _read(self, first: Sampled, spread_of: Callable[[GroupScores], Tensor], layout: Layout, step: int) -> Tensor:
        """[P] s_p of the first batch, which from the step statistics_from on goes into S."""
        spread = spread_of(first.scored.groups)
        total, count = layout.sum_over_data_parallel(torch.tensor([spread.sum().item(), float(len(spread))])).tolist()
        if step + 1 >= self.settings.statistics_from and count:
            self.num_statistics += 1
            share = max(1 - self.settings.exponential_mean, 1 / self.num_statistics)
            self.mean_spread += share * (total / count - self.mean_spread)
        return spread

    def _kept(self, spread: Tensor) -> list[int]:
        """The groups that stay."""
        return ((spread > 0) & (spread >= self.settings.ratio * self.mean_spread)).nonzero().flatten().tolist()


def _places(num_fresh: int, room: int, layout: Layout) -> tuple[int, int]:
    """How many of a batch's prompts that stay find a place: of this replica, and of all. All ranks call.

    They take the places in the order of the global batch, as in a run with one replica, so that no split of the batch
    over replicas changes which prompts are trained on. Replicas may end up with different numbers.
    """
    fresh = torch.zeros(layout.data_parallel_size, dtype=torch.float64)
    fresh[layout.data_parallel_rank] = num_fresh
    fresh = layout.sum_over_data_parallel(fresh)
    before = int(fresh[: layout.data_parallel_rank].sum())
    return min(num_fresh, max(0, room - before)), min(room, int(fresh.sum()))


def _assembled(picks: Sequence[tuple[Sampled, int]], first: Sampled, actor: MegatronJEPOActor) -> Sampled:
    """One batch of groups of several, numbered and packed anew."""
    prompts, rollouts = [], []
    for place, (part, group) in enumerate(picks):
        size = part.scored.batch.group_size
        prompts.append(part.prompts[group])
        rollouts += [replace(one, group=place) for one in part.rollouts[group * size : (group + 1) * size]]
    scored = assembled([(part.scored, group) for part, group in picks], first.scored.batch)
    return Sampled(prompts, rollouts, replace(scored, rows=pack(scored.batch.to_score, actor.row_shape)))
