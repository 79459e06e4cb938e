"""SwiGLU for a CPU, where Megatron has no fused one: fewer passes over memory, and only its input is kept.

y = silu(g) u,  [g, u] = x;      dg = dy u silu'(g),  du = dy silu(g)
"""

from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from torch import Tensor


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, -1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_and_up,) = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, -1)
        total = torch.empty_like(gate_and_up)
        of_gate, of_up = total.chunk(2, -1)
        torch.mul(torch.nn.functional.silu(gate), grad, out=of_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=of_gate)
        return total


class GatedMLP(MLP):
    """Megatron's MLP of a dense layer without biases."""

    def forward(self, hidden_states: Tensor, per_token_scale: None = None, **_: object) -> tuple[Tensor, Tensor | None]:
        """Output, and no bias, of [T, 1, H] hidden states."""
        gate_and_up, _no_bias = self.linear_fc1(hidden_states)
        output: tuple[Tensor, Tensor | None] = self.linear_fc2(_SwiGLU.apply(gate_and_up))
        return output
