"""Packing, on random batches: what goes in comes out, once, in rows as long as their content."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_jepo.data.packing import RowShape, idle_row, pack, padded_rows
from nemo_jepo.types import PackedRow, Spliced

ROW = 24
PLAIN, SHARED = RowShape(ROW), RowShape(ROW, share_prompts=True)


def sequence(
    prompt: int, chain: int, answer: int = 0, failed: bool = False, first_id: int = 1, group: int = 3
) -> Spliced:
    """Ids of the prompt depend on the group alone, so siblings share them."""
    own = range(first_id, first_id + chain + answer)
    return Spliced(
        group=group,
        sample=1,
        token_ids=(*range(5000 + 100 * group, 5000 + 100 * group + prompt), *own),
        prompt_length=prompt,
        chain_length=chain,
        answer_length=answer,
        valid=answer > 0,
        has_marker=answer > 0,
        failed=failed,
    )


@st.composite
def batches(draw: st.DrawFn) -> list[Spliced]:
    """Up to 8 groups of up to 5 samples."""
    batch = []
    for group, prompt in enumerate(draw(st.lists(st.integers(1, 8), max_size=8))):
        sample = st.builds(
            sequence,
            prompt=st.just(prompt),
            chain=st.integers(0, 8),
            answer=st.integers(0, 8),
            failed=st.booleans(),
            first_id=st.integers(0, 1000),
            group=st.just(group),
        )
        batch += draw(st.lists(sample, max_size=5))
    return batch


def segments(row: PackedRow) -> list[slice]:
    ends = row.cu_seqlens.tolist()
    return [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]


def to_score(sequences: list[Spliced]) -> list[int]:
    return [i for i, s in enumerate(sequences) if not s.failed and len(s.token_ids) > s.prompt_length]


def content(row: PackedRow) -> int:
    """Tokens before the padding."""
    used = {int(row.prompt_segment[k]) for k in range(len(row.prompt_segment))} - {-1}
    return sum(p.stop - p.start for k, p in enumerate(segments(row)) if k in used or row.sequence_index[p.start] >= 0)


@pytest.mark.parametrize("shape", [PLAIN, SHARED, RowShape(ROW, share_prompts=True, row_multiple=8, one_length=True)])
@given(sequences=batches())
def test_every_sequence_to_score_can_be_read_back_from_exactly_one_segment_and_its_prompt(shape, sequences):
    found = []
    for row in pack(sequences, shape):
        assert len(row.token_ids) == len(row.position_ids) == len(row.sequence_index) == len(row.scored_mask) <= ROW
        assert row.token_ids.dtype == row.position_ids.dtype == row.sequence_index.dtype == torch.int64
        assert row.cu_seqlens.dtype == torch.int32 and row.scored_mask.dtype == torch.bool
        places = segments(row)
        for place, prompt in zip(places, row.prompt_segment.tolist(), strict=True):
            (index,) = set(row.sequence_index[place].tolist())
            if index == -1:
                assert prompt == -1 and not row.scored_mask[place].any()
                assert row.position_ids[place].tolist() == list(range(place.stop - place.start))
                continue
            seen = [places[prompt], place] if prompt >= 0 else [place]
            member = sequences[index]
            assert tuple(token for part in seen for token in row.token_ids[part].tolist()) == member.token_ids
            assert [p for part in seen for p in row.position_ids[part].tolist()] == list(range(member.length))
            num_scored = member.chain_length + member.answer_length
            mask = [scored for part in seen for scored in row.scored_mask[part].tolist()]
            assert mask == [False] * member.prompt_length + [True] * num_scored
            assert not row.scored_mask[place.start], "the token before a scored one is in its segment"
            found.append(index)
    assert sorted(found) == to_score(sequences)


@given(sequences=batches())
def test_a_prompt_stands_in_a_row_once_and_is_shared_by_all_its_samples_there(sequences):
    for row in pack(sequences, SHARED):
        groups: dict[int, list[int]] = {}
        for place, prompt in zip(segments(row), row.prompt_segment.tolist(), strict=True):
            index = int(row.sequence_index[place.start])
            if index >= 0 and sequences[index].prompt_length > 1:
                groups.setdefault(sequences[index].group, []).append(prompt)
        for prompts in groups.values():
            assert len(prompts) == 1 or (len(set(prompts)) == 1 and prompts[0] >= 0)


@pytest.mark.parametrize("shape", [PLAIN, SHARED])
@given(sequences=batches())
def test_no_two_rows_would_fit_into_one_and_none_has_padding(shape, sequences):
    used = [len(row.token_ids) for row in pack(sequences, shape)]
    assert all(first + second > ROW for i, first in enumerate(used) for second in used[:i])
    assert [content(row) for row in pack(sequences, shape)] == used


def test_rows_have_nearly_equal_lengths():
    rows = pack([sequence(prompt=1, chain=length - 1, group=i) for i, length in enumerate([12, 8, 6, 4, 2])], PLAIN)
    assert [len(row.token_ids) for row in rows] == [16, 16]  # first-fit alone: 24 and 8


def test_rows_stay_as_first_fit_fills_them_where_a_balanced_one_would_be_too_long():
    lengths = [8, 12, 8, 12, 8]  # two full rows of 24; each to the shortest row gives 12 + 8 + 8 = 28
    rows = pack([sequence(prompt=1, chain=length - 1, group=i) for i, length in enumerate(lengths)], PLAIN)
    assert [set(row.sequence_index.tolist()) for row in rows] == [{1, 3}, {0, 2, 4}]


def test_a_group_that_does_not_fit_into_a_row_has_its_prompt_in_each_of_them():
    rows = pack([sequence(prompt=9, chain=6) for _ in range(4)], SHARED)  # 8 + 4 * 7 tokens
    assert sorted(len(row.token_ids) for row in rows) == [22, 22]
    assert all(row.prompt_segment.tolist() == [-1, 0, 0] for row in rows)


def test_a_lone_sample_and_a_prompt_of_one_token_share_nothing():
    rows = pack([sequence(5, 2, group=0), sequence(1, 2, group=1), sequence(1, 3, group=1)], SHARED)
    assert all((row.prompt_segment == -1).all() for row in rows)


def test_rows_are_padded_to_a_multiple_or_to_one_length_but_never_beyond_the_longest_row():
    batch = [sequence(prompt=1, chain=length - 1, group=length) for length in (23, 12)]
    assert [len(row.token_ids) for row in pack(batch, RowShape(ROW, row_multiple=16))] == [24, 16]
    assert [len(row.token_ids) for row in pack(batch, RowShape(ROW, one_length=True))] == [23, 23]


def test_segments_are_padded_for_context_parallelism():
    (row,) = pack([sequence(2, 3), sequence(1, 1)], RowShape(ROW, segment_multiple=4, row_multiple=4))
    assert row.cu_seqlens.tolist() == [0, 8, 12]
    assert row.position_ids.tolist() == [*range(8), *range(4)]


def test_padded_rows_hold_one_sequence_each():
    rows = padded_rows([sequence(2, 3), sequence(1, 1), sequence(4, 0)], ROW)
    assert [row.cu_seqlens.tolist() for row in rows] == [[0, 5, ROW], [0, 2, ROW]]


@pytest.mark.parametrize("rows_of", [lambda batch: pack(batch, SHARED), lambda batch: padded_rows(batch, ROW)])
def test_a_sequence_longer_than_a_row_is_an_error_that_names_it(rows_of):
    with pytest.raises(ValueError, match=r"sequence 1 \(prompt 3, sample 1\) has 25 tokens.*tokens_per_micro_batch"):
        rows_of([sequence(1, 1), sequence(5, 20)])


def test_a_long_prompt_with_nothing_to_score_needs_no_row():
    assert pack([sequence(prompt=100, chain=0)], SHARED) == []
    assert pack([dataclasses.replace(sequence(2, 3), failed=True)], SHARED) == []


def test_an_idle_row_has_nothing_to_score():
    row = idle_row(300, RowShape(512))
    assert row.cu_seqlens.tolist() == [0, 128, 256, 300] and not row.scored_mask.any()
