"""Sequences in, log-probs and the objective's tables out: the one scoring pass of training, evaluation, the weight
sync's parity probe and the FP8 guard.

P prompts of this rank, G sequences per prompt, N = P * G sequences ordered by (group, sample).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from torch import Tensor

from nemo_jepo.actor.actor import MegatronJEPOActor
from nemo_jepo.data.packing import pack
from nemo_jepo.objective.records import GroupScores, Scored
from nemo_jepo.objective.tables import group_scores
from nemo_jepo.types import PackedRow, Scores, SplicedBatch

Timer = Callable[[str], AbstractContextManager[None]]
"""A phase's name -> a context that adds its seconds somewhere."""


def untimed(phase: str) -> AbstractContextManager[None]:
    """A timer that measures nothing."""
    return nullcontext()


def score(
    actor: MegatronJEPOActor,
    batch: SplicedBatch,
    timer: Timer = untimed,
    *,
    read_reference: bool = True,
    for_update: bool = False,
) -> Scored:
    """Pack the batch, and score its tokens under the current weights and the reference policy; all ranks call.

    Supervised targets, which hold nothing that was sampled, are packed and not scored: their update reads lengths
    alone. A sequence without a chain is one more that shares its prompt's row.

    Args:
        batch: of this replica.
        timer: of the phases logprobs and init_logprobs.
        read_reference: False leaves the reference policy out.
        for_update: keep the policy's graph for train_step, where it fits (model.update_passes).
    Returns:
        The same on every rank of the replica.
    """
    everything = batch.to_score
    rows = pack(everything, actor.row_shape)
    to_score = rows if any(sequence.sampled for sequence in everything) else []
    reference: Scores | None = None
    if read_reference:  # first: its weights take the place of the policy's, which a kept graph needs
        with timer("init_logprobs"):
            reference = actor.get_init_policy_logprobs(to_score, len(everything))
    keep_graph = for_update and actor.keeps_graph(rows)
    with timer("logprobs"):
        graph: Sequence[Tensor] = ()
        if keep_graph:
            policy, graph = actor.get_log_probs_with_graph(to_score, len(everything))
        else:
            policy = actor.get_inference_log_probs(to_score, len(everything))
    groups = group_scores(batch, policy, reference)
    return Scored(batch=batch, rows=rows, policy=policy, graph=graph, reference=reference, groups=groups)


def assembled(picks: Sequence[tuple[Scored, int]], like: SplicedBatch) -> Scored:
    """Groups of batches that were scored apart as one batch, numbered anew; without rows.

    Args:
        picks: (where, which group), in the new order.
        like: what the batches have in common: group size, and what is read of them.
    """
    size = like.group_size
    samples = [(part, group * size + sample) for part, group in picks for sample in range(size)]
    behind_none = [(part, len(part.sequences) + group) for part, group in picks if like.no_chain is not None]

    def side_by_side(scores_of: Callable[[Scored], Scores | None]) -> Scores | None:
        found = [(scores_of(part), index) for part, index in (*samples, *behind_none)]
        scored = [(scores, index) for scores, index in found if scores is not None]
        if len(scored) < len(found):
            return None
        entropies = tuple(scores.entropies[index] for scores, index in scored if scores.entropies)
        return Scores(tuple(scores.policy_logprobs[index] for scores, index in scored), entropies)

    places = [place for place in range(len(picks)) for _ in range(size)]
    no_chain = [part.batch.no_chain[group] for part, group in picks if part.batch.no_chain is not None]
    rewards = [part.batch.rewards[index] for part, index in samples if part.batch.rewards is not None]
    batch = SplicedBatch(
        sequences=[replace(part.sequences[i], group=place) for (part, i), place in zip(samples, places, strict=True)],
        group_size=size,
        rewards=None if like.rewards is None else rewards,
        no_chain=None if like.no_chain is None else [replace(one, group=place) for place, one in enumerate(no_chain)],
        by_token=like.by_token,
    )
    policy, reference = side_by_side(lambda part: part.policy), side_by_side(lambda part: part.reference)
    assert policy is not None
    groups = group_scores(batch, policy, reference)
    return Scored(batch=batch, rows=(), policy=policy, reference=reference, groups=groups)


def rescore_in_bf16(actor: MegatronJEPOActor, scored: Scored, rows: Sequence[PackedRow]) -> GroupScores:
    """The tables again, from a second pass over some of the rows with FP8 left out; all ranks call.

    Sequences of other rows have answer_logprob 0.
    """
    with actor.in_bf16():
        policy = actor.get_inference_log_probs(rows, len(scored.batch.to_score))
    return group_scores(replace(scored.batch, rewards=None), policy)
