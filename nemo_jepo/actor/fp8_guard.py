"""Whether FP8 scores can carry the advantages: one row is scored again in BF16, and its error set against their spread.

    error  = sqrt( mean_i (l_i^fp8 - l_i^bf16)^2 )                       valid samples of the row, nats
    spread = sqrt( sum_g sum_i (l_gi - mean_g)^2 / sum_g (m_g - 1) )     groups g with m_g >= 2 valid samples, nats
    ratio  = error / spread

l_i = log pi(a*|x, c_i). An advantage is made of differences of l_i inside a group, so at a ratio of 1 it is noise. An
error that a whole group shares would do no harm and still counts here. A row holds few samples, so one reading is
rough; the next one takes another row.

Shape letters: P prompts of this rank, G sequences per prompt, N = P * G.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_jepo.actor.actor import MegatronJEPOActor
from nemo_jepo.actor.scoring import rescore_in_bf16
from nemo_jepo.objective.records import Scored


def squared_error(answer_logprob: Tensor, exact: Tensor, mask: Tensor) -> Tensor:
    """Sum over mask of (answer_logprob - exact)^2, and how many they are; both add up over replicas.

    Args:
        answer_logprob, exact: [P, G] float64, nats.
        mask: [P, G] bool: what stands elsewhere is not read.
    Returns:
        [2] float64.
    """
    difference = torch.where(mask, answer_logprob - exact, 0.0)
    return torch.stack([difference.square().sum(), mask.sum().double()])


def squared_spread(answer_logprob: Tensor, valid_mask: Tensor) -> Tensor:
    """Sum of squared deviations from each group's mean, and their degrees of freedom; both add up over replicas.

    Args:
        answer_logprob: [P, G] float64, nats.
        valid_mask: [P, G] bool; a group with fewer than 2 valid samples has no spread and no degree of freedom.
    Returns:
        [2] float64.
    """
    count = valid_mask.sum(-1, keepdim=True)
    counted = valid_mask & (count >= 2)
    values = torch.where(counted, answer_logprob, 0.0)
    deviation = torch.where(counted, values - values.sum(-1, keepdim=True) / count.clamp_min(1), 0.0)
    return torch.stack([deviation.square().sum(), (counted.sum(-1) - 1).clamp_min(0).sum().double()])


@dataclass(frozen=True, slots=True)
class Reading:
    """What one comparison found, over all replicas; nats."""

    error: float
    spread: float

    @property
    def ratio(self) -> float:
        """error / spread; 0 where there is neither."""
        if self.spread == 0:
            return math.inf if self.error else 0.0
        return self.error / self.spread

    def metrics(self) -> dict[str, float]:
        """As they are reported."""
        return {
            "fp8_logprob_error": self.error,
            "fp8_group_spread": self.spread,
            "fp8_error_ratio": self.ratio,
        }


def guard_fp8(actor: MegatronJEPOActor, scored: Scored, step: int, say: Callable[[str], None]) -> dict[str, float]:
    """Every model.fp8_guard_interval steps compare, report, and warn or turn to BF16; every rank must call.

    Each replica scores one of its rows, another one every time. The sums are reduced over the data-parallel group, so
    every rank finds the same ratio and does the same.

    Args:
        scored: of this step, by FP8 under the weights that the actor has now.
        step: optimizer steps done.
        say: shows a line to whoever watches the run.
    Returns:
        `Reading.metrics`; {} where nothing is due, or no sample or no group could be compared.
    """
    model = actor.model_config
    if model.fp8 is None or actor.scores_in_bf16 or not model.fp8_guard_interval or step % model.fp8_guard_interval:
        return {}
    reading = _compare(actor, scored, turn=step // model.fp8_guard_interval)
    if reading is None:
        return {}
    if not reading.ratio <= model.fp8_guard_ratio:  # not a number is no good ratio either
        found = f"the FP8 log-probs of answers are off by {reading.error:.3g} nats (root mean square), "
        found += f"{reading.ratio:.3g} of their spread within groups; model.fp8_guard_ratio={model.fp8_guard_ratio:g}"
        actor.scores_in_bf16 = model.fp8_guard_action == "bf16"
        remedy = "scoring in BF16 from now on" if actor.scores_in_bf16 else "model.fp8_guard_action=bf16 would help"
        say(f"step {step + 1}: {found}; {remedy}")
    return reading.metrics()


def _compare(actor: MegatronJEPOActor, scored: Scored, turn: int) -> Reading | None:
    """One row of each replica against BF16, all replicas together; None without a sample or a group to compare."""
    groups = scored.groups
    chosen = [scored.rows[turn % len(scored.rows)]] if scored.rows else []
    exact = rescore_in_bf16(actor, scored, chosen).answer_logprob
    in_row = torch.zeros(len(scored.sequences), dtype=torch.bool)
    for row in chosen:
        here = row.sequence_index[row.scored_mask]
        in_row[here[here < len(in_row)]] = True  # not those without a chain, which are counted behind
    mask = groups.valid_mask & in_row.view_as(groups.valid_mask)
    sums = [squared_error(groups.answer_logprob, exact, mask), squared_spread(groups.answer_logprob, groups.valid_mask)]
    (error, samples), (spread, freedom) = actor.layout.sum_over_data_parallel(torch.stack(sums)).tolist()
    if not samples or not freedom:
        return None
    return Reading(error=math.sqrt(error / samples), spread=math.sqrt(spread / freedom))
