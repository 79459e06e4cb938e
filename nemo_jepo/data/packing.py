"""Sequences -> rows of tokens. A row is a micro-batch, as long as its content.

A prompt is computed once for all its samples: its tokens but the last are one segment, and every sample is a segment
that starts with the prompt's last token and sees the prompt segment as well. So the token before a scored one is always
in the same segment.

    x_1 .. x_m-1 | x_m c_1 a | x_m c_2 a | ...        m - 1 + sum_i (1 + c_i + a) tokens instead of sum_i (m + c_i + a)

R rows, T tokens of the longest row allowed, S scored tokens.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nemo_jepo.types import PackedRow, Spliced

PADDING_ID = 0
"""Token id under padding: any id of the vocabulary does, nothing reads it."""
PADDING_SEGMENT = 128
"""Tokens of one padding segment, at most: attention costs the square of a segment."""


@dataclass(frozen=True, slots=True)
class RowShape:
    """What a row may be."""

    max_tokens: int
    """T: no row is longer."""
    share_prompts: bool = False
    """Compute a prompt once for its samples; with segment_multiple 1 only."""
    segment_multiple: int = 1
    """Every segment is padded to a multiple of it, which divides T: twice the ranks of context parallelism. Padding
    follows its sequence, where causal attention lets nobody see it."""
    row_multiple: int = 1
    """A row shorter than T is padded to a multiple of it."""
    one_length: bool = False
    """Pad all rows of a batch to the longest: pipeline stages expect one shape."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """What has to lie in one row: samples that share a prompt segment, or one whole sequence."""

    members: tuple[int, ...]
    shared: int
    """Tokens of the prompt segment; 0: none."""
    tokens: int


def pack(sequences: Sequence[Spliced], shape: RowShape) -> list[PackedRow]:
    """Few rows of nearly equal length that hold every sequence to score.

    First-fit decreasing says how many rows there are: at most 11/9 of the fewest possible, plus one. Then the longest
    piece goes first, each to the shortest row. Equal input gives equal rows. A sequence that failed, or has nothing
    after its prompt, is in no row. A prompt whose samples do not fit into one row is computed once in each of theirs.

    Args:
        sequences: N sequences; `PackedRow.sequence_index` counts in this order.
        shape: of the rows.
    Returns:
        R rows, the content of each followed by short padding segments.
    Raises:
        ValueError: a sequence is longer than a row.
    """
    pieces = sorted(_pieces(sequences, shape), key=lambda piece: -piece.tokens)
    rows = _balanced(pieces, shape.max_tokens)
    lengths = [_row_length(sum(piece.tokens for piece in row), shape) for row in rows]
    if shape.one_length:
        lengths = [max(lengths)] * len(lengths) if lengths else []
    return [_packed_row(sequences, row, length, shape) for row, length in zip(rows, lengths, strict=True)]


def padded_rows(sequences: Sequence[Spliced], tokens_per_row: int) -> list[PackedRow]:
    """One sequence per row of T tokens: what packing is measured against."""
    shape = RowShape(tokens_per_row)
    return [_packed_row(sequences, [piece], tokens_per_row, shape) for piece in _pieces(sequences, shape)]


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _row_length(content: int, shape: RowShape) -> int:
    return min(_round_up(content, shape.row_multiple), shape.max_tokens)


def _pieces(sequences: Sequence[Spliced], shape: RowShape) -> list[_Piece]:
    """All that is scored, by prompt; every sequence must fit into a row."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, sequence in enumerate(sequences):
        if not sequence.failed and sequence.chain_length + sequence.answer_length > 0:
            _require_fit(index, sequence, shape)
            groups[sequence.token_ids[: sequence.prompt_length]].append(index)
    pieces = []
    for members in groups.values():
        shared = sequences[members[0]].prompt_length - 1
        if shape.share_prompts and shared > 0 and len(members) > 1:
            pieces.extend(_shared_pieces(sequences, members, shared, shape.max_tokens))
        else:
            for index in members:
                pieces.append(_Piece((index,), 0, _round_up(sequences[index].length, shape.segment_multiple)))
    return pieces


def _require_fit(index: int, sequence: Spliced, shape: RowShape) -> None:
    if _round_up(sequence.length, shape.segment_multiple) > shape.max_tokens:
        raise ValueError(
            f"sequence {index} (prompt {sequence.group}, sample {sequence.sample}) has {sequence.length} tokens, a "
            f"row {shape.max_tokens}. Raise model.tokens_per_micro_batch, or lower data.max_prompt_tokens, "
            "rollout.max_tokens or data.max_answer_tokens."
        )


def _shared_pieces(sequences: Sequence[Spliced], members: Sequence[int], shared: int, max_tokens: int) -> list[_Piece]:
    """The samples of one prompt in as few pieces as first-fit decreasing finds, each with the prompt once."""
    parts: list[list[int]] = []
    tokens: list[int] = []
    for index in sorted(members, key=lambda index: -sequences[index].length):
        own = sequences[index].length - shared
        part = next((part for part, used in enumerate(tokens) if used + own <= max_tokens), len(parts))
        if part == len(parts):
            parts.append([])
            tokens.append(shared)
        parts[part].append(index)
        tokens[part] += own
    return [
        _Piece((part[0],), 0, used) if len(part) == 1 else _Piece(tuple(sorted(part)), shared, used)
        for part, used in zip(parts, tokens, strict=True)
    ]


def _balanced(pieces: Sequence[_Piece], max_tokens: int) -> list[list[_Piece]]:
    """Rows of pieces, which come longest first: as many as first-fit needs, and of nearly equal length if that fits."""
    first_fit: list[list[_Piece]] = []
    used: list[int] = []
    for piece in pieces:
        row = next((row for row, tokens in enumerate(used) if tokens + piece.tokens <= max_tokens), len(used))
        if row == len(used):
            first_fit.append([])
            used.append(0)
        first_fit[row].append(piece)
        used[row] += piece.tokens
    balanced: list[list[_Piece]] = [[] for _ in used]
    used = [0] * len(used)
    for piece in pieces:
        row = used.index(min(used))
        balanced[row].append(piece)
        used[row] += piece.tokens
    return balanced if all(tokens <= max_tokens for tokens in used) else first_fit


class _RowBuilder:
    """The tensors of one row, segment by segment."""

    def __init__(self, length: int) -> None:
        self.token_ids = torch.full((length,), PADDING_ID, dtype=torch.int64)
        self.position_ids = torch.zeros(length, dtype=torch.int64)
        self.sequence_index = torch.full((length,), -1, dtype=torch.int64)
        self.scored_mask = torch.zeros(length, dtype=torch.bool)
        self.ends = [0]
        self.prompt_segment: list[int] = []

    def add(self, length: int, token_ids: Sequence[int] = (), first_position: int = 0, prompt_segment: int = -1) -> int:
        """A segment of so many tokens, the first of them given; returns where it starts."""
        start = self.ends[-1]
        self.token_ids[start : start + len(token_ids)] = torch.tensor(token_ids, dtype=torch.int64)
        self.position_ids[start : start + length] = torch.arange(first_position, first_position + length)
        self.ends.append(start + length)
        self.prompt_segment.append(prompt_segment)
        return start

    def row(self) -> PackedRow:
        """As a record."""
        return PackedRow(
            token_ids=self.token_ids,
            position_ids=self.position_ids,
            cu_seqlens=torch.tensor(self.ends, dtype=torch.int32),
            prompt_segment=torch.tensor(self.prompt_segment, dtype=torch.int64),
            sequence_index=self.sequence_index,
            scored_mask=self.scored_mask,
        )


def _packed_row(sequences: Sequence[Spliced], pieces: Sequence[_Piece], length: int, shape: RowShape) -> PackedRow:
    row = _RowBuilder(length)
    for piece in pieces:
        # What the samples share
        prompt = -1
        if piece.shared:
            row.add(piece.shared, sequences[piece.members[0]].token_ids[: piece.shared])
            prompt = len(row.prompt_segment) - 1
        # Each sample
        for index in piece.members:
            sequence = sequences[index]
            own = sequence.length - piece.shared
            padded = _round_up(own, shape.segment_multiple)
            start = row.add(padded, sequence.token_ids[piece.shared :], piece.shared, prompt)
            row.sequence_index[start : start + own] = index
            row.scored_mask[start + sequence.prompt_length - piece.shared : start + own] = True
    # Padding
    segment = _round_up(PADDING_SEGMENT, shape.segment_multiple)
    while row.ends[-1] < length:
        row.add(min(segment, length - row.ends[-1]))
    return row.row()


def idle_row(length: int, shape: RowShape) -> PackedRow:
    """A row of padding: who has nothing to score still takes part in the collectives."""
    return _packed_row([], [], length, shape)
