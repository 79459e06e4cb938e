"""Attention over a packed row: every implementation that is there, against fp32."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tests.gpu.checks.common import (
    DEVICE,
    GPU,
    Report,
    Sizes,
    Skip,
    kind_of,
    profile,
    relative_error,
    require_transformer_engine,
    seconds_of,
    waits,
)


def attention(report: Report, size: Sizes) -> None:
    """Packed attention against SDPA of every segment alone in fp32: which kernels ran, errors, milliseconds."""
    from nemo_jepo.actor.attention import PackedAttention, PackedRowParams, has_flash_attention

    bounds = torch.tensor([0, *size.segments], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tokens, longest = int(bounds[-1]), max(size.segments)
    draw = torch.Generator(DEVICE).manual_seed(1)
    dtype = torch.bfloat16 if GPU else torch.float32
    counts = (size.heads, size.kv_heads, size.kv_heads)
    inputs = [torch.randn(tokens, n, size.head_size, generator=draw, device=DEVICE).to(dtype) for n in counts]
    upstream = torch.randn(tokens, size.heads * size.head_size, generator=draw, device=DEVICE).to(dtype)

    def results(attend: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        own = [tensor.to(dtype).detach().requires_grad_() for tensor in inputs]
        output = attend(*own)
        return [output.detach(), *torch.autograd.grad(output, own, upstream.to(dtype))]

    def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        outputs = []
        for segment in zip(*(tensor.split(size.segments) for tensor in (query, key, value)), strict=True):
            q, k, v = (tensor.transpose(0, 1)[None] for tensor in segment)
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                found = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            outputs.append(found[0].transpose(0, 1).flatten(1))
        return torch.cat(outputs)

    row = PackedRowParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        bounds=bounds,
        device=torch.device(DEVICE),
    )
    local = PackedAttention(None, 1)  # type: ignore[arg-type]
    variants: dict[str, Callable[..., Tensor]] = {"SDPA over buckets": partial(local._buckets, row=row)}
    if has_flash_attention(inputs[0]):
        variants["torch flash attention"] = partial(local._flash, row=row)
    report["local layers use"] = list(variants)[-1]
    report.expect(not GPU or len(variants) == 2, "torch's flash attention serves packed rows")
    try:
        require_transformer_engine()
        variants["Transformer Engine"] = transformer_engine_attention(size, bounds.to(DEVICE), longest)
    except Skip as missing:
        report["Transformer Engine"] = str(missing)

    expected = results(exact, torch.float32)
    length = torch.tensor(size.segments, dtype=torch.float64)
    flops = 4 * size.heads * size.head_size * float((length**2).sum()) / 2
    for name, attend in variants.items():
        found = results(attend, dtype)
        names = ("output", "query gradient", "key gradient", "value gradient")
        errors = {n: relative_error(f, e) for n, f, e in zip(names, found, expected, strict=True)}
        with torch.no_grad():
            forward = seconds_of(lambda attend=attend: [attend(*inputs) for _ in range(10)]) / 10
        both = seconds_of(lambda attend=attend: [results(attend, dtype) for _ in range(10)]) / 10
        traced = profile(lambda attend=attend: results(attend, dtype))
        report[name] = {
            "errors": errors,
            "forward_ms": 1e3 * forward,
            "forward_and_backward_ms": 1e3 * both,
            "forward_tflops": flops / forward / 1e12,
            "waits": waits(lambda attend=attend: results(attend, dtype)),
            "kernels": [k["kernel"] for k in traced["top_kernels"] if kind_of(k["kernel"]) == "attention"][:4],
        }
        report.expect(max(errors.values()) < 0.02, f"{name} is within 2% of fp32")


def transformer_engine_attention(size: Sizes, bounds: Tensor, longest: int) -> Callable[..., Tensor]:
    """Its attention over a packed row, as Megatron calls it."""
    from transformer_engine.pytorch import DotProductAttention

    core = DotProductAttention(
        size.heads,
        size.head_size,
        num_gqa_groups=size.kv_heads,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal",
    )

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return core(
            query,
            key,
            value,
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            attn_mask_type="padding_causal",
        ).flatten(1)

    return attend
