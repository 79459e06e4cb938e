"""Attention over a packed row: every implementation that is there, against fp32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from nemo_jepo.actor.row import RowParams


def attention(report: Report, size: Sizes) -> None:
    """Rotation and packed attention against every segment alone in fp32: which kernels ran, errors, milliseconds.

    Once with segments of their own and once with shared prompts.
    """
    for name, prompts in {"alone": [-1] * len(size.segments), "shared prompts": size.prompt_segments}.items():
        report[name] = Report()
        compare_kernels(report[name], size, prompts)
        report.faults += [f"{name}: {fault}" for fault in report[name].faults]


def compare_kernels(report: Report, size: Sizes, prompts: Sequence[int]) -> None:
    """One row."""
    from nemo_jepo.actor.attention import PackedAttention, has_flash_attention, rotate
    from nemo_jepo.actor.row import row_params
    from nemo_jepo.types import PackedRow

    bounds = torch.tensor([0, *size.segments], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tokens = int(bounds[-1])
    starts = [size.segments[prompt] if prompt >= 0 else 0 for prompt in prompts]
    positions = torch.cat([torch.arange(n) + s for n, s in zip(size.segments, starts, strict=True)])
    draw = torch.Generator(DEVICE).manual_seed(1)
    dtype = torch.bfloat16 if GPU else torch.float32
    counts = (size.heads, size.kv_heads, size.kv_heads)
    inputs = [torch.randn(tokens, n, size.head_size, generator=draw, device=DEVICE).to(dtype) for n in counts]
    upstream = torch.randn(tokens, size.heads * size.head_size, generator=draw, device=DEVICE).to(dtype)
    frequencies = 10000.0 ** -(torch.arange(0, size.head_size, 2, device=DEVICE) / size.head_size)

    def results(attend: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        own = [tensor.to(dtype).detach().requires_grad_() for tensor in inputs]
        output = attend(*own)
        return [output.detach(), *torch.autograd.grad(output, own, upstream.to(dtype))]

    def turned(tensor: Tensor) -> Tensor:
        angles = torch.outer(positions.to(tensor), frequencies)[:, None]
        one, two = tensor.chunk(2, -1)
        return torch.cat([one * angles.cos() - two * angles.sin(), two * angles.cos() + one * angles.sin()], -1)

    def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        queries, keys, values = (t.split(size.segments) for t in (turned(query), turned(key), value))
        outputs = []
        for number, prompt in enumerate(prompts):
            seen = [prompt, number] if prompt >= 0 else [number]
            q = queries[number].transpose(0, 1)[None]
            k, v = (torch.cat([part[s] for s in seen]).transpose(0, 1)[None] for part in (keys, values))
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=DEVICE).tril(k.shape[2] - q.shape[2])
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                found = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
            outputs.append(found[0].transpose(0, 1).flatten(1))
        return torch.cat(outputs)

    packed = PackedRow(
        token_ids=torch.zeros(tokens, dtype=torch.long),
        position_ids=positions,
        cu_seqlens=bounds,
        prompt_segment=torch.tensor(prompts),
        sequence_index=torch.zeros(tokens, dtype=torch.long),
        scored_mask=torch.zeros(tokens, dtype=torch.bool),
    )
    row = row_params(packed, torch.arange(tokens), frequencies, dtype, torch.device(DEVICE))
    local = PackedAttention(None, 1)  # type: ignore[arg-type]

    def over_buckets(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return local._buckets(*(rotate(tensor, row) for tensor in (query, key)), value, row)

    variants: dict[str, Callable[..., Tensor]] = {"SDPA over buckets": over_buckets}
    if has_flash_attention(inputs[0]):
        variants["torch flash attention"] = partial(local, packed_seq_params=row)
    report["local layers use"] = list(variants)[-1]
    report.expect(not GPU or len(variants) == 2, "torch's flash attention serves packed rows")
    try:
        require_transformer_engine()
        variants["Transformer Engine"] = transformer_engine_attention(size, row)
    except Skip as missing:
        report["Transformer Engine"] = str(missing)

    expected = results(exact, torch.float32)
    length, before = (torch.tensor(numbers, dtype=torch.float64) for numbers in (size.segments, starts))
    flops = 4 * size.heads * size.head_size * float((length**2 / 2 + length * before).sum())
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


def transformer_engine_attention(size: Sizes, row: RowParams) -> Callable[..., Tensor]:
    """Its attention over a packed row, as a layer of the actor calls it."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_jepo.actor.parallel import init_distributed, init_model_parallel
    from nemo_jepo.actor.te_attention import RowAttention
    from nemo_jepo.config.schema import ModelConfig

    init_distributed()
    init_model_parallel(ModelConfig())
    config = TransformerConfig(
        num_layers=1,
        hidden_size=size.heads * size.head_size,
        num_attention_heads=size.heads,
        num_query_groups=size.kv_heads,
        kv_channels=size.head_size,
        attention_dropout=0.0,
    )
    core = RowAttention(config, 1, AttnMaskType.causal, "self")

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return core(query, key, value, None, AttnMaskType.causal, packed_seq_params=row).flatten(1)

    return attend
