"""The norm and the gated activation of local layers against autograd of their definitions, in fp64."""

import torch

from nemo_jepo.actor.local_layers import _RMSNorm, _SwiGLU

DRAW = torch.Generator()


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=DRAW.manual_seed(sum(shape)), dtype=torch.float64)


def test_the_norm_is_its_definition():
    x, upstream, weight = normal(5, 1, 3, 8).requires_grad_(), normal(5, 1, 3, 8).flip(0), normal(8).requires_grad_()
    expected = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight
    found = _RMSNorm.apply(x, weight, 0.1)
    torch.testing.assert_close(found, expected)
    gradients, expected_gradients = (torch.autograd.grad(y, (x, weight), upstream) for y in (found, expected))
    torch.testing.assert_close(gradients, expected_gradients)


def test_the_gated_activation_is_its_definition():
    x, upstream = (3 * normal(5, 1, 14)).requires_grad_(), normal(5, 1, 7)
    gate, up = x.chunk(2, -1)
    expected, found = gate * torch.sigmoid(gate) * up, _SwiGLU.apply(x)
    torch.testing.assert_close(found, expected)
    (grad,), (expected_grad,) = (torch.autograd.grad(y, x, upstream) for y in (found, expected))
    torch.testing.assert_close(grad, expected_grad)
