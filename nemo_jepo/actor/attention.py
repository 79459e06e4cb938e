"""Core attention over packed rows: causal inside every segment, with its shared prompt before it, never across.

Queries and keys are rotated here too, by each token's position: a sample's segment starts behind its prompt's.

    o_t = softmax(q_t [K_prompt; K_segment up to t]^T / sqrt(D)) [V_prompt; V_segment up to t]

`row.py` says who attends to whom. Transformer Engine's kernels serve in TransformerEngineAttention, torch's flash
attention or SDPA in PackedAttention.

Shape letters: T tokens of a row on this rank, H heads on this rank, H_kv heads of keys and values, D head size.
"""

import inspect
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_jepo.actor.row import RowParams, Slots

try:  # torch 2.10 and newer
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]

_NAMED_GQA: dict[str, Any] = {}
if varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters:
    _NAMED_GQA = {"enable_gqa": True}  # where it has no name, fewer key heads are simply taken


class _Rotate(torch.autograd.Function):
    """(x_1, x_2) -> (x_1 cos - x_2 sin, x_2 cos + x_1 sin) of the two halves of every head; backward turns back."""

    @staticmethod
    def forward(ctx, tensor: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cosine, sine)
        return _turned(tensor, cosine, sine, -1)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
        cosine, sine = ctx.saved_tensors
        return _turned(gradient, cosine, sine, 1), None, None


def _turned(tensor: Tensor, cosine: Tensor, sine: Tensor, sign: int) -> Tensor:
    turned = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    (one, two), (out_one, out_two) = tensor.chunk(2, -1), turned.chunk(2, -1)
    torch.mul(one, cosine, out=out_one).addcmul_(two, sine, value=sign)
    torch.mul(two, cosine, out=out_two).addcmul_(one, sine, value=-sign)
    return turned


def rotate(tensor: Tensor, row: RowParams) -> Tensor:
    """[T, heads, D] queries or keys, turned by their positions."""
    return _Rotate.apply(tensor, row.cosine, row.sine)


class _Take(torch.autograd.Function):
    """Tokens [T, ...] -> the same at given slots [slots, ...]; backward sums a token's slots, in order and in fp32."""

    @staticmethod
    def forward(ctx, tensor: Tensor, slots: Slots) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.slots = slots
        return tensor.index_select(0, slots.tokens)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
        slots: Slots = ctx.slots
        total = gradient.index_select(0, slots.first)
        if slots.further:
            several = total.index_select(0, slots.shared).to(torch.promote_types(total.dtype, torch.float32))
            for again in slots.further:
                several[: len(again)] += gradient.index_select(0, again)
            total.index_copy_(0, slots.shared, several.to(total.dtype))
        return total, None


class _Untake(torch.autograd.Function):
    """Slots [slots, ...] -> tokens [T, ...], where every token has one slot; what no token has gets gradient 0."""

    @staticmethod
    def forward(ctx, tensor: Tensor, slots: Slots) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.slots, ctx.shape = slots, tensor.shape
        return tensor.index_select(0, slots.first)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
        return gradient.new_zeros(ctx.shape).index_copy_(0, ctx.slots.first, gradient), None


class PackedAttention(torch.nn.Module):
    """Core attention where Transformer Engine is not installed. Grouped-query attention is native; there is no dropout:
    policy-gradient training must score and train one policy.

    In half precision on a GPU torch's flash attention takes the row as it is; elsewhere, and with context parallelism,
    SDPA serves segments of similar length together. No call waits for the device.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_: object
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: RowParams | None = None,
        **_: object,
    ) -> Tensor:
        """Attention output [T, H * D] of query [T, H, D] and key, value [T, H_kv, D]."""
        assert packed_seq_params is not None, "the actor feeds packed rows only"
        row = packed_seq_params
        query, key = rotate(query, row), rotate(key, row)
        if row.context_size > 1:
            key, value = (
                gather_from_sequence_parallel_region(tensor, tensor_parallel_output_grad=True, group=row.context_group)
                for tensor in (key, value.contiguous())
            )
        elif has_flash_attention(query):
            return self._flash(query, key, value, row)
        return self._buckets(query, key, value, row)

    def _flash(self, query: Tensor, key: Tensor, value: Tensor, row: RowParams) -> Tensor:
        key, value = seen_keys(key, value, row)
        bounds = row.cu_seqlens_q, row.cu_seqlens_kv, row.max_seqlen_q, row.max_seqlen_kv
        causal = {"window_size": (-1, 0), "scale": self.softmax_scale} | _NAMED_GQA  # the last query sees the last key
        output = varlen_attn(query, key, value, *bounds, **causal)
        assert isinstance(output, Tensor), "nothing beside the output was asked for"
        return output.flatten(1)

    def _buckets(self, query: Tensor, key: Tensor, value: Tensor, row: RowParams) -> Tensor:
        plan = row.buckets
        counts = [segments * queries for segments, queries, _ in plan.shapes]
        key_counts = [segments * keys for segments, _, keys in plan.shapes]
        queries = _Take.apply(query, plan.queries).split(counts)
        keys, values = (_Take.apply(tensor, plan.keys).split(key_counts) for tensor in (key, value))
        contexts = []
        for (segments, _, _), mask, *heads in zip(plan.shapes, plan.masks, queries, keys, values, strict=True):
            # Right padding: a real query never sees a padded key under the causal mask.
            q, k, v = (tensor.unflatten(0, (segments, -1)).transpose(1, 2) for tensor in heads)
            context = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True, scale=self.softmax_scale
            )
            contexts.append(context.transpose(1, 2).flatten(0, 1))
        return _Untake.apply(torch.cat(contexts), plan.queries).flatten(1)


def seen_keys(key: Tensor, value: Tensor, row: RowParams) -> tuple[Tensor, Tensor]:
    """[T, H_kv, D] keys and values -> those that each segment's queries see, as cu_seqlens_kv counts them."""
    if not row.shares_prompts:
        return key, value
    return _Take.apply(key, row.keys), _Take.apply(value, row.keys)


def has_flash_attention(query: Tensor) -> bool:
    """Whether torch's flash attention serves this query: Ampere or newer, half precision, heads of up to 256."""
    return (
        varlen_attn is not None
        and query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )
