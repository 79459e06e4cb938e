"""Packed rows in, log-probs of their tokens out. The next-token shift of the whole project happens here, once.

Shape letters: T tokens of a row, S its scored tokens (chain of thought and answer), H hidden size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nemo_jepo.actor.attention import BucketedSeqParams, segment_buckets
from nemo_jepo.actor.logprobs import chunked_logprobs
from nemo_jepo.actor.model import HiddenStateGPTModel, unwrap
from nemo_jepo.actor.parallel import Layout
from nemo_jepo.types import PackedRow, Scores


@dataclass(frozen=True, slots=True)
class TokenHead:
    """The output layer as it is used here: log-probs of scored tokens from a row's hidden states."""

    vocab_size: int
    chunk_tokens: int

    def __call__(self, gpt: HiddenStateGPTModel, hidden: Tensor, row: PackedRow) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the row's scored tokens in row order.

            token_logprobs[s] = log pi(token_ids[t_s] | tokens before t_s in its segment),  from hidden[t_s - 1]

        Args:
            gpt: the last pipeline stage.
            hidden: [T, 1, H], or [T / TP, 1, H] under sequence parallelism.
            row: scored tokens are never the first of their segment.
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
        scored = row.scored_mask.nonzero()[:, 0].to(hidden.device)
        target = row.token_ids.to(hidden.device)[scored]
        # hidden[t - 1] predicts token t.
        states = hidden[:, 0].index_select(0, scored - 1).to(weight.dtype)
        return chunked_logprobs(states, weight, target, first_token, self.chunk_tokens, group)


def sequence_parameters(row: PackedRow, device: torch.device) -> BucketedSeqParams:
    """What attention needs to keep a row's segments apart."""
    cu_seqlens = row.cu_seqlens.to(device)
    longest = int((row.cu_seqlens[1:] - row.cu_seqlens[:-1]).max())
    return BucketedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        buckets=[bucket.to(device) for bucket in segment_buckets(row.cu_seqlens)],
    )


def run_rows(
    model: torch.nn.Module,
    rows: Sequence[tuple[PackedRow, Tensor]],
    head: TokenHead,
    forward_only: bool,
) -> list[dict[str, Tensor]]:
    """One pass over packed rows through the pipeline, a row a micro-batch, in Megatron's own schedule.

        loss = - sum_rows sum_s weight_s * logprob_s

    Gradients (unless forward_only) are summed over rows and over data-parallel ranks; nothing is averaged.

    Args:
        rows: (row, weights [S]) pairs, at least one, the same number on every rank of a replica.
    Returns:
        On the last stage a mapping a row: loss [], token_logprobs [S], entropies [S], detached; [] elsewhere.
    """

    def forward_step(batch: Iterator[tuple[PackedRow, Tensor]], chunk: torch.nn.Module):  # type: ignore[no-untyped-def]
        row, weights = next(batch)
        gpt = unwrap(chunk)
        device = next(gpt.parameters()).device
        hidden = chunk(
            row.token_ids[None].to(device),
            row.position_ids[None].to(device),
            None,
            packed_seq_params=sequence_parameters(row, device),
        )

        def loss_func(hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            token_logprobs, entropies = head(gpt, hidden, row)
            loss = -torch.dot(weights.to(token_logprobs), token_logprobs)
            report = {"loss": loss.detach(), "token_logprobs": token_logprobs.detach(), "entropies": entropies}
            return loss, torch.ones((), dtype=torch.int, device=device), report

        return hidden, loss_func

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(rows),
        model=model,
        num_microbatches=len(rows),
        seq_length=len(rows[0][0].token_ids),
        micro_batch_size=1,
        forward_only=forward_only,
    )


def score_rows(model: torch.nn.Module, rows: Sequence[PackedRow], head: TokenHead, layout: Layout) -> list[Tensor]:
    """Log-probs and entropies of every row's scored tokens, on every rank of the replica, without gradient.

    Returns:
        One [2, S] fp32 host tensor a row: log-probs, entropies (nats).
    """
    counts = [int(row.scored_mask.sum()) for row in rows]
    with torch.no_grad():
        reports = run_rows(model, [(row, torch.zeros(n)) for row, n in zip(rows, counts, strict=True)], head, True)
    if layout.is_last_stage:
        flat = torch.cat([torch.stack([report["token_logprobs"], report["entropies"]]) for report in reports], dim=1)
    else:
        flat = torch.empty(2, sum(counts), device=layout.device)
    return list(layout.from_last_stage(flat).cpu().split(counts, dim=1))


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
