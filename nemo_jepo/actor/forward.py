"""Packed rows in, log-probs of their tokens out. The next-token shift of the whole project happens here, once.

Shape letters: T tokens of a row, S its scored tokens (chain of thought and answer), H hidden size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from nemo_jepo.actor.context import local_positions
from nemo_jepo.actor.logprobs import chunked_logprobs
from nemo_jepo.actor.model import HiddenStateGPTModel, unwrap
from nemo_jepo.actor.parallel import Layout
from nemo_jepo.actor.row import row_params, to_device
from nemo_jepo.types import PackedRow, Scores


@dataclass(frozen=True, slots=True)
class TokenHead:
    """The output layer as it is used here: log-probs of scored tokens from a row's hidden states."""

    vocab_size: int
    chunk_tokens: int

    def __call__(
        self,
        gpt: HiddenStateGPTModel,
        hidden: Tensor,
        row: PackedRow,
        positions: Tensor,
        weights: Tensor | None = None,
        *,
        with_entropy: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs and entropies of the row's scored tokens in row order; 0 where another context rank has them.

            token_logprobs[s] = log pi(token_ids[t_s] | tokens that t_s sees),  from hidden[t_s - 1]

        Args:
            gpt: the chunk with the output layer.
            hidden: [T, 1, H], or [T / TP, 1, H] under sequence parallelism; T / C with context parallelism.
            row: scored tokens are never the first of their segment.
            positions: [T] row positions of this rank's hidden states.
            weights: [S], if the loss will be -(weights . token_logprobs): then gradients are formed along the way.
        Returns:
            ([S], [S] or None) fp32, nats; gradient flows through the first. All-reduces over the tensor-parallel group.
        """
        if gpt.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
        matrix, group = gpt.head_weight(), gpt.pg_collection.tp
        first_token = group.rank() * matrix.shape[0]
        real = slice(0, self.vocab_size - first_token)  # vocabulary padding is never scored
        main_grad = getattr(matrix, "main_grad", None) if torch.is_grad_enabled() else None
        scored = row.scored_mask.nonzero()[:, 0]
        slot_of = torch.full_like(row.token_ids, -1)
        slot_of[positions] = torch.arange(len(positions))
        slots = slot_of[scored - 1]  # hidden[t - 1] predicts token t
        here = slots >= 0
        states = hidden[:, 0].index_select(0, to_device(slots[here], hidden.device)).to(matrix.dtype)
        found = chunked_logprobs(
            states,
            matrix[real],
            to_device(row.token_ids[scored[here]], hidden.device),
            first_token,
            self.chunk_tokens,
            group,
            token_weights=None if weights is None else to_device(weights[here], hidden.device),
            with_entropy=with_entropy,
            main_grad=None if main_grad is None else main_grad[real],
        )
        if bool(here.all()):
            return found
        where = (to_device(here.nonzero()[:, 0], hidden.device),)
        token_logprobs, entropies = (
            None if values is None else values.new_zeros(len(scored)).index_put(where, values) for values in found
        )
        assert token_logprobs is not None
        return token_logprobs, entropies


def run_rows(
    chunks: Sequence[torch.nn.Module],
    rows: Sequence[PackedRow],
    head: TokenHead,
    layout: Layout,
    weights: Sequence[Tensor] | None = None,
    *,
    with_entropy: bool = False,
) -> list[dict[str, Tensor]]:
    """One pass over packed rows through the pipeline, a row a micro-batch, in Megatron's own schedule.

        loss = - sum_rows sum_s weight_s * logprob_s

    Gradients are summed over rows, context-parallel and data-parallel ranks; nothing is averaged.

    Args:
        rows: at least one, as many as `num_micro_batches` says.
        weights: [S] of each row, for a backward pass; None: forward only.
        with_entropy: report it too.
    Returns:
        On the last stage a mapping a row: token_logprobs [S] and entropies [S], what this context rank has of them, and
        loss []; the log-probs of a forward pass keep their graph where gradients are enabled. [] elsewhere.
    """
    weight_of: Sequence[Tensor | None] = [None] * len(rows) if weights is None else weights
    batches = list(zip(rows, weight_of, strict=True))

    def forward_step(batch: Iterator[tuple[PackedRow, Tensor | None]], chunk: torch.nn.Module):  # type: ignore[no-untyped-def]
        row, weight = next(batch)
        gpt = unwrap(chunk)
        device = layout.device
        positions = local_positions(row.cu_seqlens, layout.context_group.rank(), layout.context_group.size())
        token_ids = to_device(row.token_ids[None, positions], device)
        params = row_params(
            row, positions, gpt.inverse_frequencies, gpt.config.params_dtype, device, layout.context_group
        )
        hidden = chunk(token_ids, None, None, packed_seq_params=params)  # the core attention reads positions

        def loss_func(hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
            token_logprobs, entropies = head(gpt, hidden, row, positions, weight, with_entropy=with_entropy)
            report = {"token_logprobs": token_logprobs, "entropies": entropies}
            loss = token_logprobs.new_zeros(())
            if weight is not None:
                loss = -torch.dot(to_device(weight, device).to(token_logprobs), token_logprobs)
                report = {"token_logprobs": token_logprobs.detach(), "entropies": entropies, "loss": loss.detach()}
            return loss, torch.ones((), dtype=torch.int, device=device), report

        return hidden, loss_func

    interleaved = len(chunks) > 1
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in chunks] if interleaved else iter(batches),
        model=list(chunks) if interleaved else chunks[0],
        num_microbatches=len(rows),
        seq_length=len(rows[0].token_ids),
        micro_batch_size=1,
        forward_only=weights is None,
    )


def go_backward(
    chunks: Sequence[torch.nn.Module], graph: Sequence[Tensor], weights: Sequence[Tensor], layout: Layout
) -> list[dict[str, Tensor]]:
    """The backward pass of `run_rows` from the log-probs that a forward pass kept; no pipeline stages.

    Args:
        graph: [S] log-probs of each row; their graphs are freed.
        weights: [S] of each row.
    Returns:
        As run_rows: the loss of each row.
    """
    reports = []
    for token_logprobs, weight in zip(graph, weights, strict=True):
        gradient = -to_device(weight, layout.device).to(token_logprobs)
        reports.append({"loss": torch.dot(gradient, token_logprobs.detach())})
        token_logprobs.backward(gradient)
    get_model_config(chunks[0]).finalize_model_grads_func(list(chunks))
    return reports


def num_micro_batches(num_rows: int, num_chunks: int, layout: Layout) -> int:
    """Micro-batches that this rank must run for its replica's rows; all ranks of the data-parallel group call.

    With expert parallelism every layer exchanges tokens between replicas, so all run the same number. An interleaved
    schedule takes a multiple of its stages.
    """
    if layout.expert_group.size() > 1:
        num_rows = int(layout.max_over_data_parallel(torch.tensor(num_rows)))
    stages = layout.pipeline_group.size() if num_chunks > 1 else 1
    return -(-num_rows // stages) * stages


def score_rows(
    chunks: Sequence[torch.nn.Module],
    rows: Sequence[PackedRow],
    head: TokenHead,
    layout: Layout,
    *,
    with_entropy: bool = True,
    keep_graph: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probs and entropies of every row's scored tokens, on every rank of the replica.

    Args:
        rows: as many as `num_micro_batches` says.
        keep_graph: for `go_backward`; no pipeline stages then.
    Returns:
        (one [2, S] fp32 host tensor a row: log-probs, entropies (nats), or [1, S] without entropies;
        with keep_graph the rows' log-probs on the device, with their graph, else []).
    """
    with torch.set_grad_enabled(keep_graph):
        reports = run_rows(chunks, rows, head, layout, with_entropy=with_entropy)
    names = ("token_logprobs", "entropies") if with_entropy else ("token_logprobs",)
    counts = [int(row.scored_mask.sum()) for row in rows]
    if layout.is_last_stage:
        flat = torch.stack([torch.cat([report[name].detach() for report in reports]) for name in names])
    else:
        flat = torch.empty(len(names), sum(counts), device=layout.device)
    flat = layout.sum_over_context(layout.from_last_stage(flat))
    graph = [report["token_logprobs"] for report in reports] if keep_graph else []
    return list(flat.cpu().split(counts, dim=1)), graph


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
    entropies = tuple(value[1] for value in values if len(value) > 1)
    return Scores(policy_logprobs=tuple(value[0] for value in values), entropies=entropies)
