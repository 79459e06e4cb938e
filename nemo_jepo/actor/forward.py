"""Packed rows in, log-probs of their tokens out. The next-token shift of the whole project happens here, once.

Shape letters: T tokens of a row, S its scored tokens (chain of thought and answer), H hidden size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nemo_jepo.actor.attention import PackedRowParams
from nemo_jepo.actor.context import local_positions, to_device
from nemo_jepo.actor.logprobs import chunked_logprobs
from nemo_jepo.actor.model import HiddenStateGPTModel, unwrap
from nemo_jepo.actor.parallel import Layout
from nemo_jepo.types import PackedRow, Scores


@dataclass(frozen=True, slots=True)
class TokenHead:
    """The output layer as it is used here: log-probs of scored tokens from a row's hidden states."""

    vocab_size: int
    chunk_tokens: int

    def __call__(
        self, gpt: HiddenStateGPTModel, hidden: Tensor, row: PackedRow, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the row's scored tokens in row order; 0 where another context rank has them.

            token_logprobs[s] = log pi(token_ids[t_s] | tokens before t_s in its segment),  from hidden[t_s - 1]

        Args:
            gpt: the chunk with the output layer.
            hidden: [T, 1, H], or [T / TP, 1, H] under sequence parallelism; T / C with context parallelism.
            row: scored tokens are never the first of their segment.
            positions: [T] row positions of this rank's hidden states.
        Returns:
            ([S], [S]) fp32, nats; gradient flows through the first. All-reduces over the tensor-parallel group.
        """
        if gpt.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
        weight, group = gpt.head_weight(), gpt.pg_collection.tp
        first_token = group.rank() * weight.shape[0]
        weight = weight[: self.vocab_size - first_token]  # vocabulary padding is never scored
        scored = row.scored_mask.nonzero()[:, 0]
        slot_of = torch.full_like(row.token_ids, -1)
        slot_of[positions] = torch.arange(len(positions))
        slots = slot_of[scored - 1]  # hidden[t - 1] predicts token t
        here = slots >= 0
        states = hidden[:, 0].index_select(0, to_device(slots[here], hidden.device)).to(weight.dtype)
        target = to_device(row.token_ids[scored[here]], hidden.device)
        found = chunked_logprobs(states, weight, target, first_token, self.chunk_tokens, group)
        where = (to_device(here.nonzero()[:, 0], hidden.device),)
        token_logprobs, entropies = (values.new_zeros(len(scored)).index_put(where, values) for values in found)
        return token_logprobs, entropies


def sequence_parameters(
    row: PackedRow, device: torch.device, context_group: dist.ProcessGroup, on_device: bool
) -> PackedRowParams:
    """What attention and rotary embedding need to keep a row's segments apart.

    Args:
        on_device: Transformer Engine's kernels read the bounds on the device; Megatron's own rotary embedding reads
            them on the host, several times a layer, and would wait for the device each time.
    """
    cu_seqlens = to_device(row.cu_seqlens, device) if on_device else row.cu_seqlens
    longest = int((row.cu_seqlens[1:] - row.cu_seqlens[:-1]).max())
    return PackedRowParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        bounds=row.cu_seqlens,
        device=device,
        context_group=context_group,
    )


def run_rows(
    chunks: Sequence[torch.nn.Module],
    rows: Sequence[tuple[PackedRow, Tensor]],
    head: TokenHead,
    layout: Layout,
    forward_only: bool,
) -> list[dict[str, Tensor]]:
    """One pass over packed rows through the pipeline, a row a micro-batch, in Megatron's own schedule.

        loss = - sum_rows sum_s weight_s * logprob_s

    Gradients (unless forward_only) are summed over rows, context-parallel and data-parallel ranks; nothing is averaged.

    Args:
        rows: (row, weights [S]) pairs, at least one, as many as `num_micro_batches` says.
    Returns:
        On the last stage a mapping a row: loss [], token_logprobs [S], entropies [S], detached, what this context rank
        has of them; [] elsewhere.
    """

    def forward_step(batch: Iterator[tuple[PackedRow, Tensor]], chunk: torch.nn.Module):  # type: ignore[no-untyped-def]
        row, weights = next(batch)
        gpt = unwrap(chunk)
        device = layout.device
        positions = local_positions(row.cu_seqlens, layout.context_group.rank(), layout.context_group.size())
        hidden = chunk(
            to_device(row.token_ids[None, positions], device),
            to_device(row.position_ids[None, positions], device),
            None,
            packed_seq_params=sequence_parameters(row, device, layout.context_group, gpt.config.apply_rope_fusion),
        )

        def loss_func(hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            token_logprobs, entropies = head(gpt, hidden, row, positions)
            loss = -torch.dot(to_device(weights, device).to(token_logprobs), token_logprobs)
            report = {"loss": loss.detach(), "token_logprobs": token_logprobs.detach(), "entropies": entropies}
            return loss, torch.ones((), dtype=torch.int, device=device), report

        return hidden, loss_func

    interleaved = len(chunks) > 1
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(rows) for _ in chunks] if interleaved else iter(rows),
        model=list(chunks) if interleaved else chunks[0],
        num_microbatches=len(rows),
        seq_length=len(rows[0][0].token_ids),
        micro_batch_size=1,
        forward_only=forward_only,
    )


def num_micro_batches(num_rows: int, num_chunks: int, layout: Layout) -> int:
    """Micro-batches that this rank must run for its replica's rows; all ranks of the data-parallel group call.

    With expert parallelism every layer exchanges tokens between replicas, so all run the same number. An interleaved
    schedule takes a multiple of its stages.
    """
    if layout.expert_group.size() > 1:
        num_rows = int(layout.max_over_data_parallel(torch.tensor(num_rows)))
    stages = layout.pipeline_group.size() if num_chunks > 1 else 1
    return -(-num_rows // stages) * stages


def idle_row(tokens: int, segment_tokens: int) -> PackedRow:
    """A row of padding: who has nothing to score still takes part in the collectives.

    Args:
        segment_tokens: length of its segments but the last; attention costs their square.
    """
    bounds = [*range(0, tokens, segment_tokens), tokens]
    return PackedRow(
        token_ids=torch.zeros(tokens, dtype=torch.long),
        position_ids=torch.arange(tokens) % segment_tokens,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        sequence_index=torch.full((tokens,), -1),
        scored_mask=torch.zeros(tokens, dtype=torch.bool),
    )


def score_rows(
    chunks: Sequence[torch.nn.Module], rows: Sequence[PackedRow], head: TokenHead, layout: Layout
) -> list[Tensor]:
    """Log-probs and entropies of every row's scored tokens, on every rank of the replica, without gradient.

    Args:
        rows: as many as `num_micro_batches` says.
    Returns:
        One [2, S] fp32 host tensor a row: log-probs, entropies (nats).
    """
    counts = [int(row.scored_mask.sum()) for row in rows]
    weighted = [(row, torch.zeros(count)) for row, count in zip(rows, counts, strict=True)]
    with torch.no_grad():
        reports = run_rows(chunks, weighted, head, layout, forward_only=True)
    if layout.is_last_stage:
        flat = torch.cat([torch.stack([report["token_logprobs"], report["entropies"]]) for report in reports], dim=1)
    else:
        flat = torch.empty(2, sum(counts), device=layout.device)
    flat = layout.sum_over_context(layout.from_last_stage(flat))
    return list(flat.cpu().split(counts, dim=1))


def to_sequences(rows: Sequence[PackedRow], row_values: Sequence[Tensor], num_sequences: int) -> list[Tensor]:
    """Undo the packing: values at scored tokens, by sequence.

    Args:
        row_values: one [..., S] tensor a row.
        num_sequences: N of the batch; a sequence that no row holds gets an empty tensor.
    Returns:
        N tensors [..., chain_length + answer_length].
    """
    empty = row_values[0][..., :0]
    values = [empty] * num_sequences
    for row, of_row in zip(rows, row_values, strict=True):
        owner = row.sequence_index[row.scored_mask]
        for index in owner.unique().tolist():
            values[index] = of_row[..., owner == index]
    return values


def to_rows(rows: Sequence[PackedRow], sequence_values: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of to_sequences: one [S] tensor a row, scored tokens in row order."""
    row_values = []
    for row in rows:
        order = torch.unique_consecutive(row.sequence_index[row.scored_mask]).tolist()
        row_values.append(torch.cat([sequence_values[index] for index in order]) if order else torch.zeros(0))
    return row_values


def scores_of(rows: Sequence[PackedRow], row_values: Sequence[Tensor], num_sequences: int) -> Scores:
    """Per-sequence Scores from what score_rows returned."""
    values = to_sequences(rows, row_values, num_sequences)
    return Scores(policy_logprobs=tuple(value[0] for value in values), entropies=tuple(value[1] for value in values))
