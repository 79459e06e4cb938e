"""SwiGLU in few passes against autograd of its definition."""

import torch

from nemo_jepo.actor.swiglu import _SwiGLU


def test_values_and_gradients_are_those_of_the_definition():
    draw = torch.Generator().manual_seed(1)
    x = (3 * torch.randn(5, 1, 14, generator=draw, dtype=torch.float64)).requires_grad_()
    upstream = torch.randn(5, 1, 7, generator=draw, dtype=torch.float64)
    gate, up = x.chunk(2, -1)
    expected, found = gate * torch.sigmoid(gate) * up, _SwiGLU.apply(x)
    torch.testing.assert_close(found, expected)
    (grad,), (expected_grad,) = (torch.autograd.grad(y, x, upstream) for y in (found, expected))
    torch.testing.assert_close(grad, expected_grad)
