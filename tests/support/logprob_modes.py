"""Every way to call chunked_logprobs, and what whole logits in fp64 give; S tokens, H hidden size, V vocabulary."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_jepo.actor.logprobs import Group, chunked_logprobs

S, H, V = 13, 6, 1301
CHUNK = 4
"""4 chunks of tokens, or 3 slabs of the vocabulary: neither S nor V is a multiple of their size."""


@dataclass(frozen=True, slots=True)
class Mode:
    """What a caller may know, have and want."""

    known: bool
    """Whether token_weights are given."""
    main_grad: bool
    with_entropy: bool = True

    def __str__(self) -> str:
        parts = ["now" if self.known else "later", "main_grad" if self.main_grad else "autograd"]
        return " ".join(parts if self.with_entropy else [*parts, "no entropy"])


MODES = [Mode(known, main_grad, entropy) for known in (0, 1) for main_grad in (0, 1) for entropy in (0, 1)]

Case = tuple[Tensor, Tensor, Tensor, Tensor]
Found = dict[str, Tensor]


def draw(tokens: int = S, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Case:
    """hidden, weight, target, token weights."""
    random = torch.Generator().manual_seed(3)
    hidden = scale * torch.randn(tokens, H, generator=random, dtype=torch.float64)
    weight = torch.randn(V, H, generator=random, dtype=torch.float64)
    token_weights = torch.randn(tokens, generator=random, dtype=torch.float64)
    target = torch.randint(V, (tokens,), generator=random)
    wide = torch.promote_types(dtype, torch.float32)
    return hidden.to(dtype), weight.to(dtype), target, token_weights.to(wide)


def exact(hidden: Tensor, weight: Tensor, target: Tensor, token_weights: Tensor) -> Found:
    """Whole fp64 logits, log_softmax, autograd of -dot(token_weights, logprobs)."""
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    log_p = (hidden @ weight.T).log_softmax(-1)
    logprobs = log_p.gather(1, target[:, None])[:, 0]
    (-torch.dot(token_weights.double(), logprobs)).backward()
    entropies = -(log_p.exp() * log_p).sum(-1)
    found = {"logprobs": logprobs, "entropies": entropies, "hidden_grad": hidden.grad, "weight_grad": weight.grad}
    return {name: value.detach() for name, value in found.items()}


def chunked(
    mode: Mode,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    token_weights: Tensor,
    chunk_tokens: int = CHUNK,
    first_token: int = 0,
    group: Group = None,
) -> Found:
    """The same by chunked_logprobs; main_grad holds something before, and is rows of a larger buffer."""
    hidden, weight = (tensor.detach().clone().requires_grad_() for tensor in (hidden, weight))
    wide = torch.promote_types(weight.dtype, torch.float32)
    buffer = torch.linspace(-1, 1, 3 + weight.numel(), dtype=wide)
    before, main_grad = buffer.clone(), buffer[3:].view(weight.shape)
    logprobs, entropies = chunked_logprobs(
        hidden,
        weight,
        target,
        first_token,
        chunk_tokens,
        group,
        token_weights=token_weights if mode.known else None,
        with_entropy=mode.with_entropy,
        main_grad=main_grad if mode.main_grad else None,
    )
    (-torch.dot(token_weights, logprobs)).backward()
    added = buffer - before
    assert (weight.grad is None) == mode.main_grad and added[:3].count_nonzero() == 0
    assert mode.main_grad or added.count_nonzero() == 0
    weight_grad = added[3:].view(weight.shape) if mode.main_grad else weight.grad
    found = {"logprobs": logprobs.detach(), "hidden_grad": hidden.grad, "weight_grad": weight_grad}
    assert (entropies is None) != mode.with_entropy
    return found if entropies is None else found | {"entropies": entropies}


def assert_near(found: Found, expected: Found, tolerance: float) -> None:
    """Everything that was found, by name."""
    for name, value in found.items():
        torch.testing.assert_close(
            value.double(),
            expected[name],
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )
