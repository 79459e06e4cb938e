"""Sequences -> fixed-size token rows. A row is a micro-batch: [T] tokens, T the same for every row.

R rows, T tokens per row, S scored tokens.
"""

from collections.abc import Sequence

import torch

from nemo_jepo.types import PackedRow, Spliced

PADDING_ID = 0
"""Token id under padding: any id of the vocabulary does, nothing reads it."""
PADDING_SEGMENT = 128
"""Tokens of one padding segment, at most: attention costs the square of a segment."""


def pack(sequences: Sequence[Spliced], tokens_per_row: int, segment_multiple: int = 1) -> list[PackedRow]:
    """Few rows that hold every sequence to score, by first-fit decreasing.

    The longest sequence goes first, each into the first row with room: at most 11/9 of the fewest rows possible, plus
    one. Sequences of one length keep their order, so equal input gives equal rows. A sequence that failed, or has
    nothing after its prompt, is in no row.

    Args:
        sequences: N sequences; `PackedRow.sequence_index` counts in this order.
        tokens_per_row: T, tokens.
        segment_multiple: every segment is padded to a multiple of this, which divides T: twice the ranks of context
            parallelism. Padding follows its sequence, where causal attention lets nobody see it.
    Returns:
        R rows, each padded to T by short segments.
    Raises:
        ValueError: a sequence is longer than a row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(
        _scored(sequences, tokens_per_row, segment_multiple), key=lambda index: -sequences[index].length
    ):
        length = _padded(sequences[index].length, segment_multiple)
        row = next((row for row, free in enumerate(room) if free >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(tokens_per_row)
        rows[row].append(index)
        room[row] -= length
    return [_packed_row(sequences, members, tokens_per_row, segment_multiple) for members in rows]


def padded_rows(sequences: Sequence[Spliced], tokens_per_row: int) -> list[PackedRow]:
    """One sequence per row, otherwise as `pack`: what packing is measured against."""
    return [_packed_row(sequences, [index], tokens_per_row, 1) for index in _scored(sequences, tokens_per_row, 1)]


def _padded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _scored(sequences: Sequence[Spliced], tokens_per_row: int, segment_multiple: int) -> list[int]:
    """Which sequences have something to score; every one of them must fit into a row."""
    scored = [i for i, s in enumerate(sequences) if not s.failed and s.chain_length + s.answer_length > 0]
    for index in scored:
        sequence = sequences[index]
        if _padded(sequence.length, segment_multiple) > tokens_per_row:
            raise ValueError(
                f"sequence {index} (prompt {sequence.group}, sample {sequence.sample}) has {sequence.length} tokens, a "
                f"row {tokens_per_row}. Raise model.tokens_per_micro_batch, or lower data.max_prompt_tokens, "
                "rollout.max_tokens or data.max_answer_tokens."
            )
    return scored


def _packed_row(
    sequences: Sequence[Spliced], members: Sequence[int], tokens_per_row: int, segment_multiple: int
) -> PackedRow:
    token_ids = torch.full((tokens_per_row,), PADDING_ID, dtype=torch.int64)
    position_ids = torch.zeros(tokens_per_row, dtype=torch.int64)
    sequence_index = torch.full((tokens_per_row,), -1, dtype=torch.int64)
    scored_mask = torch.zeros(tokens_per_row, dtype=torch.bool)
    ends = [0]
    for index in members:
        sequence = sequences[index]
        start, end = ends[-1], ends[-1] + sequence.length
        token_ids[start:end] = torch.tensor(sequence.token_ids)
        sequence_index[start:end] = index
        scored_mask[start + sequence.prompt_length : end] = True
        ends.append(start + _padded(sequence.length, segment_multiple))
        position_ids[start : ends[-1]] = torch.arange(ends[-1] - start)
    while ends[-1] < tokens_per_row:
        length = min(_padded(PADDING_SEGMENT, segment_multiple), tokens_per_row - ends[-1])
        position_ids[ends[-1] : ends[-1] + length] = torch.arange(length)
        ends.append(ends[-1] + length)
    return PackedRow(
        token_ids=token_ids,
        position_ids=position_ids,
        cu_seqlens=torch.tensor(ends, dtype=torch.int32),
        sequence_index=sequence_index,
        scored_mask=scored_mask,
    )
