"""PackedAttention: every segment of a row attends as if it were alone, and the buckets that make it fast."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd

from nemo_jepo.actor.attention import PackedAttention, PackedRowParams
from nemo_jepo.actor.context import segment_buckets
from nemo_jepo.actor.forward import sequence_parameters
from nemo_jepo.types import PackedRow

HEADS, KV_HEADS, SIZE = 4, 2, 8
LENGTHS = [5, 1, 16, 7, 6, 2, 17]
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class FakeGroup:
    """A context-parallel group of one."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def heads(num_tokens: int) -> Heads:
    """query [T, H, D], key and value [T, H_kv, D], float64, with gradient."""
    draw = torch.Generator().manual_seed(1)
    shapes = [(num_tokens, count, SIZE) for count in (HEADS, KV_HEADS, KV_HEADS)]
    query, key, value = (torch.randn(s, generator=draw, dtype=torch.float64).requires_grad_() for s in shapes)
    return query, key, value


def packed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    parameters = PackedRowParams(qkv_format="thd", bounds=bounds(lengths))
    return PackedAttention(None, 1)(query, key, value, packed_seq_params=parameters)


def alone(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(Q K^T / sqrt(D) + causal mask) V of one segment, written out; a key/value head serves two query heads."""
    key, value = (tensor.repeat_interleave(HEADS // KV_HEADS, dim=1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / SIZE**0.5
    future = torch.ones(len(query), len(query), dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)


def test_every_segment_attends_as_if_it_were_alone():
    row = heads(sum(LENGTHS))
    upstream = torch.randn(sum(LENGTHS), HEADS * SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    parts = [torch.split(tensor, LENGTHS) for tensor in row]
    expected = torch.cat([alone(*segment) for segment in zip(*parts, strict=True)])
    found = packed(*row, LENGTHS)
    torch.testing.assert_close(found, expected)
    for grad, expected_grad in zip(
        torch.autograd.grad(found, row, upstream), torch.autograd.grad(expected, row, upstream), strict=True
    ):
        torch.testing.assert_close(grad, expected_grad)


def test_a_changed_segment_changes_no_other_segment():
    """Bit for bit, outputs and gradients: 7 shares a bucket with 5 and 6, so padding is exercised too."""
    row, start = heads(sum(LENGTHS)), sum(LENGTHS[:3])
    changed = slice(start, start + LENGTHS[3])
    other = tuple(tensor.detach().clone() for tensor in row)
    for tensor in other:
        tensor[changed] += 100.0
        tensor.requires_grad_()
    kept = torch.ones(sum(LENGTHS), dtype=torch.bool)
    kept[changed] = False
    before, after = packed(*row, LENGTHS), packed(*other, LENGTHS)
    assert torch.equal(before[kept], after[kept])
    assert not torch.equal(before[changed], after[changed])
    before.sum().backward()
    after.sum().backward()
    for tensor, other_tensor in zip(row, other, strict=True):
        assert torch.equal(tensor.grad[kept], other_tensor.grad[kept])


def test_the_softmax_scale_is_the_given_one():
    row = heads(4)
    parameters = PackedRowParams(qkv_format="thd", bounds=bounds([4]))
    found = PackedAttention(None, 1, softmax_scale=0.5)(*row, packed_seq_params=parameters)
    query, key, value = row
    torch.testing.assert_close(found, alone(query * 0.5 * SIZE**0.5, key, value))


@given(st.lists(st.integers(1, 70), min_size=1, max_size=40))
def test_buckets_hold_every_position_once_and_less_than_double_it(lengths):
    buckets = segment_buckets(bounds(lengths))
    held = torch.cat([bucket.keys[bucket.keys >= 0] for bucket in buckets])
    assert sorted(held.tolist()) == list(range(sum(lengths)))
    for bucket in buckets:
        assert bucket.keys.numel() < 2 * (bucket.keys >= 0).sum()
    assert len(buckets) <= (max(lengths) - 1).bit_length() + 1


@given(st.lists(st.integers(1, 70), min_size=1, max_size=40))
def test_a_row_of_a_bucket_is_one_segment_from_its_start(lengths):
    ends = bounds(lengths).tolist()
    segments = {tuple(range(start, end)) for start, end in zip(ends[:-1], ends[1:], strict=True)}
    rows = [row for bucket in segment_buckets(bounds(lengths)) for row in bucket.keys.tolist()]
    assert {tuple(position for position in row if position >= 0) for row in rows} == segments
    assert all(row[: row.index(-1)] == [p for p in row if p >= 0] for row in rows if -1 in row)


def test_attention_and_rotary_embedding_never_wait_for_the_device():
    """On the meta device no value can be read back: forward and backward pass need none of them."""
    device = torch.device("meta")
    segments = bounds(LENGTHS)
    row = PackedRow(
        token_ids=torch.zeros(sum(LENGTHS), dtype=torch.long),
        position_ids=torch.zeros(sum(LENGTHS), dtype=torch.long),
        cu_seqlens=segments,
        sequence_index=torch.zeros(sum(LENGTHS), dtype=torch.long),
        scored_mask=torch.zeros(sum(LENGTHS), dtype=torch.bool),
    )
    parameters = sequence_parameters(row, device, FakeGroup(), on_device=False)
    query, key, value = (tensor.detach().to(device).requires_grad_() for tensor in heads(sum(LENGTHS)))
    angles = torch.zeros(max(LENGTHS), 1, 1, SIZE, device=device)
    turned = [
        _apply_rotary_pos_emb_thd(tensor, parameters.cu_seqlens_q, angles, cp_group=FakeGroup())
        for tensor in (query, key)
    ]
    PackedAttention(None, 1)(*turned, value, packed_seq_params=parameters).sum().backward()
    assert query.grad.shape == query.shape
