"""PackedAttention: every segment of a row attends as if it stood alone behind its prompt, and what makes it fast."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_jepo.actor.attention import PackedAttention
from nemo_jepo.actor.row import RowParams, Slots, buckets, row_params
from nemo_jepo.types import PackedRow

HEADS, KV_HEADS, SIZE = 4, 2, 8
LENGTHS = [5, 1, 16, 7, 6, 2, 17]
ALONE = [-1] * len(LENGTHS)
SHARED = [-1, 0, 0, -1, 3, 3, 3]  # a prompt of 5 tokens with two samples, one of 7 with three
FREQUENCIES = 10000.0 ** -(torch.arange(0, SIZE, 2, dtype=torch.float64) / SIZE)
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def row_of(lengths: list[int], prompts: list[int]) -> PackedRow:
    positions = [
        torch.arange(length) + (lengths[prompt] if prompt >= 0 else 0)
        for length, prompt in zip(lengths, prompts, strict=True)
    ]
    tokens = sum(lengths)
    return PackedRow(
        token_ids=torch.zeros(tokens, dtype=torch.long),
        position_ids=torch.cat(positions),
        cu_seqlens=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        prompt_segment=torch.tensor(prompts),
        sequence_index=torch.zeros(tokens, dtype=torch.long),
        scored_mask=torch.zeros(tokens, dtype=torch.bool),
    )


def params(row: PackedRow, device: str = "cpu", dtype: torch.dtype = torch.float64) -> RowParams:
    frequencies = FREQUENCIES.to(dtype).to(device)
    return row_params(row, torch.arange(len(row.token_ids)), frequencies, dtype, torch.device(device))


def heads(num_tokens: int) -> Heads:
    """query [T, H, D], key and value [T, H_kv, D], float64, with gradient."""
    draw = torch.Generator().manual_seed(1)
    shapes = [(num_tokens, count, SIZE) for count in (HEADS, KV_HEADS, KV_HEADS)]
    query, key, value = (torch.randn(s, generator=draw, dtype=torch.float64).requires_grad_() for s in shapes)
    return query, key, value


def packed(row: Heads, lengths: list[int], prompts: list[int]) -> torch.Tensor:
    return PackedAttention(None, 1)(*row, packed_seq_params=params(row_of(lengths, prompts)))


def turned(tensor: torch.Tensor, first: int) -> torch.Tensor:
    """RoPE as complex numbers: channel pair (d, d + D/2) is multiplied by exp(i position frequency_d)."""
    angles = torch.outer(torch.arange(first, first + len(tensor), dtype=torch.float64), FREQUENCIES)
    pairs = torch.complex(tensor[..., : SIZE // 2], tensor[..., SIZE // 2 :])
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([pairs.real, pairs.imag], -1)


def alone(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float = SIZE**-0.5) -> torch.Tensor:
    """softmax(Q K^T / sqrt(D) + causal mask) V of the last queries of one sequence, written out, heads expanded."""
    before = len(key) - len(query)
    query, key = turned(query, before), turned(key, 0)
    key, value = (tensor.repeat_interleave(HEADS // KV_HEADS, dim=1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    future = torch.ones(len(query), len(key), dtype=torch.bool).triu(before + 1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)


def one_by_one(row: Heads, lengths: list[int], prompts: list[int]) -> torch.Tensor:
    query, key, value = (torch.split(tensor, lengths) for tensor in row)
    outputs = []
    for k, prompt in enumerate(prompts):
        seen = [prompt, k] if prompt >= 0 else [k]
        outputs.append(alone(query[k], torch.cat([key[s] for s in seen]), torch.cat([value[s] for s in seen])))
    return torch.cat(outputs)


@pytest.mark.parametrize("prompts", [ALONE, SHARED], ids=["alone", "shared prompts"])
def test_every_segment_attends_as_if_it_stood_alone_behind_its_prompt(prompts):
    row = heads(sum(LENGTHS))
    upstream = torch.randn(sum(LENGTHS), HEADS * SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected, found = one_by_one(row, LENGTHS, prompts), packed(row, LENGTHS, prompts)
    torch.testing.assert_close(found, expected)
    for grad, expected_grad in zip(
        torch.autograd.grad(found, row, upstream), torch.autograd.grad(expected, row, upstream), strict=True
    ):
        torch.testing.assert_close(grad, expected_grad)


def test_a_changed_segment_changes_only_those_that_see_it():
    """Bit for bit, outputs and gradients: 7 shares a bucket with 5 and 6, so padding is exercised too."""
    row, start = heads(sum(LENGTHS)), sum(LENGTHS[:4])
    changed = slice(start, start + LENGTHS[4])  # a sample, which nobody else sees
    other = tuple(tensor.detach().clone() for tensor in row)
    for tensor in other:
        tensor[changed] += 100.0
        tensor.requires_grad_()
    kept = torch.ones(sum(LENGTHS), dtype=torch.bool)
    kept[changed] = False
    before, after = packed(row, LENGTHS, SHARED), packed(other, LENGTHS, SHARED)
    assert torch.equal(before[kept], after[kept])
    assert not torch.equal(before[changed], after[changed])
    before[kept].sum().backward()
    after[kept].sum().backward()
    for tensor, other_tensor in zip(row, other, strict=True):
        assert torch.equal(tensor.grad[kept], other_tensor.grad[kept])


def test_the_softmax_scale_is_the_given_one():
    row = heads(4)
    found = PackedAttention(None, 1, softmax_scale=0.5)(*row, packed_seq_params=params(row_of([4], [-1])))
    torch.testing.assert_close(found, alone(*row, scale=0.5))


@st.composite
def rows(draw: st.DrawFn) -> PackedRow:
    """Prompts, each with up to 5 samples; no sample: a sequence alone."""
    lengths, prompts = [], []
    for _ in range(draw(st.integers(1, 8))):
        prompt = len(lengths)
        samples = draw(st.lists(st.integers(1, 70), max_size=5))
        lengths += [draw(st.integers(1, 70)), *samples]
        prompts += [-1, *[prompt] * len(samples)]
    return row_of(lengths, prompts)


@given(rows())
def test_buckets_hold_every_query_once_with_the_keys_it_sees_and_less_than_double_them(row):
    bounds, found = row.cu_seqlens.tolist(), {}
    for bucket in buckets(row):
        assert bucket.queries.numel() < 2 * (bucket.queries >= 0).sum()
        assert bucket.keys.numel() < 2 * (bucket.keys >= 0).sum()
        for number, (queries, keys) in enumerate(zip(bucket.queries.tolist(), bucket.keys.tolist(), strict=True)):
            for place, query in enumerate(queries):
                mask = [k <= place for k in range(len(keys))] if bucket.mask is None else bucket.mask[number, 0, place]
                assert any(mask), "an empty softmax is not a number"
                if query >= 0:
                    assert query not in found
                    found[query] = [key for key, seen in zip(keys, mask, strict=True) if seen]
    expected = {}
    for number, prompt in enumerate(row.prompt_segment.tolist()):
        shared = list(range(bounds[prompt], bounds[prompt + 1])) if prompt >= 0 else []
        for query in range(bounds[number], bounds[number + 1]):
            expected[query] = [*shared, *range(bounds[number], query + 1)]
    assert found == expected


@given(st.lists(st.integers(0, 6), max_size=30))
def test_slots_say_where_every_token_stands(extra):
    tokens = torch.tensor([*range(7), -1, *extra])
    slots = Slots.of(tokens, 7)
    assert torch.equal(slots.tokens, tokens.clamp_min(0))
    places = {token: [int(slots.first[token])] for token in range(7)}
    for again in slots.further:
        for token, place in zip(slots.shared.tolist(), again.tolist(), strict=False):
            places[token].append(place)
    assert all(places[token] == (tokens == token).nonzero()[:, 0].tolist() for token in range(7))


@pytest.mark.parametrize("prompts", [ALONE, SHARED], ids=["alone", "shared prompts"])
def test_attention_never_waits_for_the_device(prompts):
    """On the meta device no value can be read back: forward and backward pass need none of them."""
    parameters = params(row_of(LENGTHS, prompts), "meta", torch.float32)
    row = [tensor.detach().float().to("meta").requires_grad_() for tensor in heads(sum(LENGTHS))]
    PackedAttention(None, 1)(*row, packed_seq_params=parameters).sum().backward()
    assert row[0].grad.shape == row[0].shape
