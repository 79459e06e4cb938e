"""Packing, on random batches: what goes in comes out, once, in rows of one size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_jepo.data.packing import pack, padded_rows
from nemo_jepo.types import PackedRow, Spliced

ROW = 24


def sequence(prompt: int, chain: int, answer: int = 0, failed: bool = False, first_id: int = 1) -> Spliced:
    length = prompt + chain + answer
    return Spliced(
        group=3,
        sample=1,
        token_ids=tuple(range(first_id, first_id + length)),
        prompt_length=prompt,
        chain_length=chain,
        answer_length=answer,
        valid=answer > 0,
        has_marker=answer > 0,
        failed=failed,
    )


SEQUENCES = st.lists(
    st.builds(
        sequence,
        prompt=st.integers(1, 8),
        chain=st.integers(0, 8),
        answer=st.integers(0, 8),
        failed=st.booleans(),
        first_id=st.integers(0, 1000),
    ),
    max_size=30,
)


def segments(row: PackedRow) -> list[slice]:
    ends = row.cu_seqlens.tolist()
    return [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]


def to_score(sequences: list[Spliced]) -> list[int]:
    return [i for i, s in enumerate(sequences) if not s.failed and len(s.token_ids) > s.prompt_length]


@pytest.mark.parametrize("rows_of", [pack, padded_rows])
@given(sequences=SEQUENCES)
def test_every_sequence_to_score_is_in_exactly_one_segment_with_its_own_ids_positions_and_mask(rows_of, sequences):
    found = []
    for row in rows_of(sequences, ROW):
        assert all(len(field) == ROW for field in (row.token_ids, row.position_ids, row.sequence_index))
        assert row.token_ids.dtype == row.position_ids.dtype == row.sequence_index.dtype == torch.int64
        assert row.cu_seqlens.dtype == torch.int32 and row.scored_mask.dtype == torch.bool
        for place in segments(row):
            (index,) = set(row.sequence_index[place].tolist())
            length = place.stop - place.start
            assert row.position_ids[place].tolist() == list(range(length))
            if index == -1:
                assert place.stop == ROW and not row.scored_mask[place].any()
                continue
            member = sequences[index]
            assert tuple(row.token_ids[place].tolist()) == member.token_ids
            num_scored = member.chain_length + member.answer_length
            assert row.scored_mask[place].tolist() == [False] * member.prompt_length + [True] * num_scored
            found.append(index)
    assert sorted(found) == to_score(sequences)


@given(sequences=SEQUENCES)
def test_no_two_packed_rows_would_fit_into_one(sequences):
    used = [int((row.sequence_index >= 0).sum()) for row in pack(sequences, ROW)]
    assert all(first + second > ROW for i, first in enumerate(used) for second in used[:i])


def test_the_longest_go_first_so_that_the_short_ones_fill_the_gaps():
    lengths = [6, 6, 12, 18, 18, 12]  # 3 full rows of 24 are possible; in the given order first-fit needs 4
    rows = pack([sequence(prompt=1, chain=length - 1) for length in lengths], ROW)
    assert [set(row.sequence_index.tolist()) for row in rows] == [{3, 0}, {4, 1}, {2, 5}]


def test_padded_rows_hold_one_sequence_each():
    rows = padded_rows([sequence(2, 3), sequence(1, 1), sequence(4, 0)], ROW)
    assert [row.cu_seqlens.tolist() for row in rows] == [[0, 5, ROW], [0, 2, ROW]]


def test_a_full_row_has_no_padding_segment():
    (row,) = pack([sequence(prompt=4, chain=10, answer=10)], ROW)
    assert row.cu_seqlens.tolist() == [0, ROW]


@pytest.mark.parametrize("rows_of", [pack, padded_rows])
def test_a_sequence_longer_than_a_row_is_an_error_that_names_it(rows_of):
    with pytest.raises(ValueError, match=r"sequence 1 \(prompt 3, sample 1\) has 25 tokens.*tokens_per_micro_batch"):
        rows_of([sequence(1, 1), sequence(5, 20)], ROW)


def test_a_long_prompt_with_nothing_to_score_needs_no_row():
    assert pack([sequence(prompt=100, chain=0)], ROW) == []
