"""Log-probs of given tokens from hidden states, without full-vocabulary logits of the whole row.

    z_s = weight . hidden_s,    p_s[v] = exp z_s[v] / sum_u exp z_s[u]
    logprob_s = log p_s[target_s],    d logprob_s / d z_s[v] = 1{v = target_s} - p_s[v]

Logits exist a block at a time. What is known in the forward pass decides what a block is:

- The log-probs' gradient is not known: a block is the logits of all tokens in one slab of the vocabulary. The forward
  pass keeps the normalizer of each token; the backward pass computes the logits again. Four matrix products, and each
  row of the output matrix and of its gradient is visited once a pass.
- It is known, from `token_weights`: a block is all logits of one chunk of tokens. Both gradients are formed as soon as
  the chunk's normalizers are there. Three matrix products.

A slab is a shard of the vocabulary, and so is what a tensor-parallel rank holds: four numbers a token say all of one.

Shape letters: S scored tokens, H hidden size, V vocabulary, V_local its columns on this rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None
SLAB_MULTIPLE = 512
"""Columns of a slab are a multiple of this: aligned, and wide enough for an efficient product."""
CACHED_LOGITS = 1 << 17
"""So many, with two temporaries as large, stay in a CPU core's cache."""
ALL = slice(None)


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left . right, in out's fp32; on a GPU the factors stay in the model's precision."""
    if out.is_cuda and left.dtype != out.dtype:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left . right, in total's fp32: a sum over blocks in bf16 would round each time."""
    if total.is_cuda and left.dtype != total.dtype:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Of logits and sums: fp32, or the model's fp64."""
    return torch.promote_types(dtype, torch.float32)


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=True)  # blocks come in many sizes


@dataclass(frozen=True, slots=True)
class _Options:
    """Arguments of chunked_logprobs that are no input of autograd."""

    first_token: int
    chunk_tokens: int
    group: Group
    with_entropy: bool
    main_grad: Tensor | None


class _Logits:
    """The output layer's logits on this rank, one block after another in the same memory.

    A block is a chunk of tokens by all columns, or all tokens by a slab of columns; there are as many of either.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, target: Tensor, options: _Options) -> None:
        self.hidden, self.weight, self.target = hidden, weight, target
        self.first_token = options.first_token
        starts = range(0, len(target), options.chunk_tokens)
        self.chunks = [slice(start, start + options.chunk_tokens) for start in starts]
        columns = -(-len(weight) // max(1, len(starts)))
        columns += -columns % SLAB_MULTIPLE
        self.slabs = [slice(start, start + columns) for start in range(0, len(weight), columns)]
        self.memory = hidden.new_empty(0, dtype=_wide(weight.dtype))

    def block(self, tokens: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Logits [tokens, columns], and the column of each token's target; -1 where the target is in no column here."""
        hidden, weight = self.hidden[tokens], self.weight[columns]
        size = len(hidden) * len(weight)
        if size > len(self.memory):
            self.memory = self.memory.new_empty(size)
        logits = self.memory[:size].view(len(hidden), len(weight))
        _product(hidden, weight.t(), logits)
        column = self.target[tokens] - self.first_token - (columns.start or 0)
        return logits, torch.where((column >= 0) & (column < len(weight)), column, -1)


def _sums(logits: Tensor, column: Tensor, with_entropy: bool, scratch: Tensor | None = None) -> Tensor:
    """[tokens, 3 or 4] of a shard: m = max_v z_v, z_target, sum_v e_v, sum_v e_v log e_v, where e_v = exp(z_v - m).

    Args:
        scratch: [2, tokens, columns] that may be overwritten; None: allocated.
    """
    one, two = (None, None) if scratch is None else scratch
    largest = logits.amax(1)
    target = torch.where(column >= 0, logits.gather(1, column.clamp(min=0)[:, None])[:, 0], 0.0)
    shifted = torch.sub(logits, largest[:, None], out=one)
    exponentials = torch.exp(shifted, out=two)
    sums = [largest, target, exponentials.sum(1)]
    if with_entropy:
        sums.append(torch.mul(exponentials, shifted, out=one).sum(1))
    return torch.stack(sums, 1)


def _shard_sums(logits: Tensor, column: Tensor, with_entropy: bool) -> Tensor:
    """_sums by a kernel that reads the logits twice; on a CPU of a few tokens at a time, which stay in its cache."""
    if logits.is_cuda:
        return _compiled(_sums)(logits, column, with_entropy)
    tokens = max(1, CACHED_LOGITS // logits.shape[1])
    scratch = logits.new_empty(2, tokens, logits.shape[1])
    parts = zip(logits.split(tokens), column.split(tokens), strict=True)
    return torch.cat([_sums(*part, with_entropy, scratch[:, : len(part[0])]) for part in parts])


def _all_reduce(values: Tensor, op: dist.ReduceOp.RedOpType, group: Group) -> None:
    if group is not None and group.size() > 1:
        dist.all_reduce(values, op, group=group)


def _whole_vocabulary(shards: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor | None]:
    """Normalizers log sum_v exp z_v, log-probs and entropies, [tokens] each, from the sums of all shards.

    From a shard's own m to the largest of all, d = m_shard - m:  sum e -> exp(d) sum e,
    sum e log e -> exp(d) (sum e log e + d sum e).  Entropy = log sum e - sum e log e / sum e.

    Args:
        shards: [shards, tokens, 3 or 4] of this rank, by _sums; the group's ranks have the others.
    """
    largest, target, exponentials, *products = shards.unbind(-1)
    maximum = largest.amax(0)
    _all_reduce(maximum, dist.ReduceOp.MAX, group)
    shift = largest - maximum
    scale = shift.exp()
    terms = [target, scale * exponentials, *(scale * (product + shift * exponentials) for product in products)]
    sums = torch.stack(terms).sum(1)  # one all-reduce for all
    _all_reduce(sums, dist.ReduceOp.SUM, group)
    log_sum = sums[1].log()
    entropies = log_sum - sums[2] / sums[1] if products else None
    return maximum + log_sum, sums[0] - maximum - log_sum, entropies


def _gradient(logits: Tensor, column: Tensor, normalizer: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """[tokens, columns] of d (grad . log p(target)) / d z_v = grad (1{v = target} - p_v)."""
    gradient = -grad[:, None] * (logits - normalizer[:, None]).exp()
    target = torch.arange(logits.shape[1], device=logits.device) == column[:, None]
    return torch.where(target, gradient + grad[:, None], gradient).to(dtype)


def _gradient_in_place(logits: Tensor, column: Tensor, normalizer: Tensor, grad: Tensor) -> Tensor:
    """The same in the logits' memory; a CPU compares slowly."""
    gradient = logits.sub_(normalizer[:, None]).exp_().mul_(-grad[:, None])
    return gradient.scatter_add_(1, column.clamp(min=0)[:, None], torch.where(column >= 0, grad, 0.0)[:, None])


class _Gradients:
    """Gradients of hidden states and output matrix, summed over blocks in fp32, each where autograd asks for it."""

    def __init__(self, blocks: _Logits, main_grad: Tensor | None, hidden_needed: bool, weight_needed: bool) -> None:
        self.blocks, self.main_grad = blocks, main_grad
        hidden, weight, dtype = blocks.hidden, blocks.weight, _wide(blocks.weight.dtype)
        self.hidden = torch.zeros_like(hidden, dtype=dtype) if hidden_needed else None
        self.weight = None
        if weight_needed:
            self.weight = torch.zeros_like(weight, dtype=dtype) if main_grad is None else main_grad

    def add(
        self, tokens: slice, columns: slice, logits: Tensor, column: Tensor, normalizer: Tensor, grad: Tensor
    ) -> None:
        """Add a block's part; its logits are used up."""
        hidden, weight = self.blocks.hidden[tokens], self.blocks.weight[columns]
        if logits.is_cuda:
            gradient = _compiled(_gradient)(logits, column, normalizer, grad, weight.dtype)
        else:
            gradient = _gradient_in_place(logits, column, normalizer, grad)
        if self.hidden is not None:
            _add_product(self.hidden[tokens], gradient, weight)
        if self.weight is not None:
            _add_product(self.weight[columns], gradient.t(), hidden)

    def for_autograd(self) -> tuple[Tensor | None, Tensor | None]:
        """In the model's precision; None for what is not needed or is in main_grad."""
        hidden = None if self.hidden is None else self.hidden.to(self.blocks.hidden.dtype)
        if self.weight is None or self.main_grad is not None:
            return hidden, None
        return hidden, self.weight.to(self.blocks.weight.dtype)


class _GradientLater(torch.autograd.Function):
    """Slabs of the vocabulary. Forward keeps a normalizer a token; backward computes p = exp(z - normalizer) again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, options: _Options) -> Any:
        blocks = _Logits(hidden, weight, target, options)
        shards = [_shard_sums(*blocks.block(ALL, slab), options.with_entropy) for slab in blocks.slabs]
        normalizers, logprobs, entropies = _whole_vocabulary(torch.stack(shards), options.group)
        ctx.save_for_backward(hidden, weight, target, normalizers)
        ctx.options = options
        ctx.mark_non_differentiable(*([] if entropies is None else [entropies]))
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _entropies: Tensor | None) -> Any:
        hidden, weight, target, normalizers = ctx.saved_tensors
        blocks = _Logits(hidden, weight, target, ctx.options)
        gradients = _Gradients(blocks, ctx.options.main_grad, *ctx.needs_input_grad[:2])
        for slab in blocks.slabs:
            gradients.add(ALL, slab, *blocks.block(ALL, slab), normalizers, grad)
        return *gradients.for_autograd(), None, None


class _GradientNow(torch.autograd.Function):
    """Chunks of tokens. Forward forms the gradients of -dot(token_weights, logprobs); backward hands them out."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, options: _Options, token_weights: Tensor
    ) -> Any:
        blocks = _Logits(hidden, weight, target, options)
        gradients = _Gradients(blocks, options.main_grad, *ctx.needs_input_grad[:2])
        logprobs = hidden.new_empty(len(target), dtype=blocks.memory.dtype)
        entropies = torch.empty_like(logprobs)
        for chunk in blocks.chunks:
            logits, column = blocks.block(chunk, ALL)
            sums = _shard_sums(logits, column, options.with_entropy)
            normalizers, logprobs[chunk], of_chunk = _whole_vocabulary(sums[None], options.group)
            if of_chunk is not None:
                entropies[chunk] = of_chunk
            gradients.add(chunk, ALL, logits, column, normalizers, -token_weights[chunk])
        ctx.save_for_backward(token_weights, *gradients.for_autograd())
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies if options.with_entropy else None

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _entropies: Tensor | None) -> Any:
        token_weights, hidden_grad, weight_grad = ctx.saved_tensors
        same = torch.isclose(grad, -token_weights, rtol=0.0, atol=0.0, equal_nan=True).all()
        torch._assert_async(same, "the loss is not -dot(token_weights, logprobs)")  # the host does not wait for a GPU
        return hidden_grad, weight_grad, None, None, None


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    first_token: int,
    chunk_tokens: int,
    group: Group = None,
    *,
    token_weights: Tensor | None = None,
    with_entropy: bool = True,
    main_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of each target token and entropy of the distribution it is scored under.

        logprob_s = z_s[target_s] - log sum_v exp z_s[v],   z_s = weight . hidden_s   (fp32 log-sum-exp)
        entropy_s = - sum_v p_s[v] log p_s[v]

    Peak memory beyond inputs and results is one fp32 block of chunk_tokens * V_local logits, on a GPU a second one in
    the model's precision, and with gradients in bf16 the fp32 sum of the hidden states' one, [S, H]; without main_grad
    also of the weight's, [V_local, H].

    Args:
        hidden: [S, H], the model's dtype; its gradient is this rank's part of the sum over vocabulary shards, to be
            all-reduced over `group` by the caller (Megatron's copy/gather region functions do so).
        weight: [V_local, H], this rank's rows of the output matrix, without vocabulary padding.
        target: [S] int64, token ids in the whole vocabulary.
        first_token: id of the first row of weight.
        chunk_tokens: logits that exist at one time, in tokens; a slab of the vocabulary has at least 512 columns.
        group: tensor-parallel group over which the vocabulary is sharded; every rank of it must call. None: whole.
        token_weights: [S] fp32, detached. The loss must be exactly -dot(token_weights, logprobs): a backward pass with
            another gradient of the log-probs raises. Gradients are formed here, where they are enabled, so every call
            must see one backward pass. None: any loss.
        with_entropy: False leaves the entropies out.
        main_grad: [V_local, H] fp32, contiguous. The weight's gradient is added to it, by the backward pass or, with
            token_weights, by this call, and autograd gets none. None: autograd gets it.
    Returns:
        (logprobs [S], entropies [S] or None), fp32, nats. Gradient flows through logprobs only.
    Raises:
        RuntimeError: in the backward pass, where token_weights are not minus the gradient of the log-probs; on a GPU at
            the host's next wait for it.
    Source: arXiv 2503.19618, the log pi of Eqs. 5 and 7.
    """
    options = _Options(first_token, chunk_tokens, group, with_entropy, main_grad)
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if token_weights is not None and needs_gradient:
        return _GradientNow.apply(hidden, weight, target, options, token_weights)
    return _GradientLater.apply(hidden, weight, target, options)
