"""Log-probs of given tokens from hidden states, without full-vocabulary logits of the whole row.

The output head runs over a few tokens at a time; the backward pass recomputes each chunk's logits. With tensor
parallelism every rank holds V_local columns of the vocabulary and only three numbers a token are all-reduced.
The gradient of the output matrix is summed over chunks in fp32.

Shape letters: S scored tokens, H hidden size, V vocabulary, V_local its columns on this rank.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


def _logits(hidden: Tensor, weight: Tensor, block: Tensor) -> Tensor:
    """fp32 logits [chunk, V_local] in block's first rows; the product's factors are in the model's precision."""
    logits = block[: hidden.shape[0]]
    if weight.dtype == logits.dtype:
        return torch.mm(hidden, weight.t(), out=logits)
    if logits.is_cuda:  # sums in fp32 anyway: not rounded on the way out
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=logits)
    return logits.copy_(torch.mm(hidden, weight.t()))


def _all_reduce(values: Tensor, op: dist.ReduceOp.RedOpType, group: Group) -> None:
    if group is not None and group.size() > 1:
        dist.all_reduce(values, op, group=group)


def _local_target(target: Tensor, first_token: int, columns: int) -> tuple[Tensor, Tensor]:
    """Column of each target on this rank (0 where another rank has it), and whether it is here."""
    column = target - first_token
    here = (column >= 0) & (column < columns)
    return torch.where(here, column, 0), here


def _logit_block(hidden: Tensor, weight: Tensor, chunk_tokens: int) -> Tensor:
    """The one [chunk, V_local] fp32 block that every chunk of a pass is computed in."""
    return hidden.new_empty((min(chunk_tokens, hidden.shape[0]), weight.shape[0]), dtype=torch.float32)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left . right, in total's fp32: a sum over chunks in bf16 would round each time."""
    if total.is_cuda and left.dtype != total.dtype:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def _sums(logits: Tensor, largest: Tensor, column: Tensor, here: Tensor) -> Tensor:
    """[3, chunk] of a chunk's columns on this rank: sum_v e_v, sum_v -e_v log e_v, z_target - m, e_v = exp(z_v - m)."""
    shifted = logits - largest[:, None]
    exponentials = shifted.exp()
    target = torch.where(here, shifted.gather(1, column[:, None])[:, 0], 0.0)
    return torch.stack([exponentials.sum(1), -(exponentials * shifted).sum(1), target])


def _sums_in_place(logits: Tensor, largest: Tensor, column: Tensor, here: Tensor) -> Tensor:
    """The same; the logits are used up."""
    logits.sub_(largest[:, None])
    target = torch.where(here, logits.gather(1, column[:, None])[:, 0], 0.0)
    exponential_sum = logits.exp_().sum(1)
    return torch.stack([exponential_sum, torch.special.entr(logits, out=logits).sum(1), target])


def _logits_gradient(
    logits: Tensor, log_normalizer: Tensor, column: Tensor, here: Tensor, grad: Tensor, dtype: torch.dtype
) -> Tensor:
    """[chunk, V_local] of d (grad . log p(target)) / d z_v = grad (1{v = target} - p_v)."""
    gradient = -grad[:, None] * (logits - log_normalizer[:, None]).exp()
    target = (torch.arange(logits.shape[1], device=logits.device) == column[:, None]) & here[:, None]
    return torch.where(target, gradient + grad[:, None], gradient).to(dtype)


def _logits_gradient_in_place(
    logits: Tensor, log_normalizer: Tensor, column: Tensor, here: Tensor, grad: Tensor, dtype: torch.dtype
) -> Tensor:
    """The same; the logits are used up."""
    gradient = logits.sub_(log_normalizer[:, None]).exp_().mul_(-grad[:, None])
    gradient.scatter_add_(1, column[:, None], torch.where(here, grad, 0.0)[:, None])
    return gradient.to(dtype)


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function)


def _functions(logits: Tensor) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Sums and gradient: on a GPU a kernel each, which reads the logits once or twice; on a CPU in place."""
    if logits.is_cuda:
        return _compiled(_sums), _compiled(_logits_gradient)
    return _sums_in_place, _logits_gradient_in_place


class _ChunkedLogProb(torch.autograd.Function):
    """Forward keeps hidden states and one log-sum-exp a token; backward recomputes p = exp(logits - lse)."""

    @staticmethod
    def forward(ctx, hidden, weight, target, first_token, chunk_tokens, group):
        num_tokens = target.shape[0]
        logprobs, entropies, log_normalizers = (
            torch.empty(num_tokens, dtype=torch.float32, device=hidden.device) for _ in range(3)
        )
        block = _logit_block(hidden, weight, chunk_tokens)
        for start in range(0, num_tokens, chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits = _logits(hidden[part], weight, block)
            largest = logits.amax(1)
            _all_reduce(largest, dist.ReduceOp.MAX, group)
            column, here = _local_target(target[part], first_token, weight.shape[0])
            sums = _functions(logits)[0](logits, largest, column, here)  # one all-reduce for the three
            _all_reduce(sums, dist.ReduceOp.SUM, group)
            log_sum = sums[0].log()
            log_normalizers[part] = largest + log_sum
            logprobs[part] = sums[2] - log_sum
            entropies[part] = log_sum + sums[1] / sums[0]
        ctx.save_for_backward(hidden, weight, target, log_normalizers)
        ctx.first_token, ctx.chunk_tokens = first_token, chunk_tokens
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad_logprobs, _grad_entropies):
        hidden, weight, target, log_normalizers = ctx.saved_tensors
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight_grad = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        block = _logit_block(hidden, weight, ctx.chunk_tokens)
        for start in range(0, target.shape[0], ctx.chunk_tokens):
            part = slice(start, start + ctx.chunk_tokens)
            logits = _logits(hidden[part], weight, block)
            column, here = _local_target(target[part], ctx.first_token, weight.shape[0])
            normalizer, grad = log_normalizers[part], grad_logprobs[part]
            logits_grad = _functions(logits)[1](logits, normalizer, column, here, grad, weight.dtype)
            if hidden_grad is not None:
                torch.mm(logits_grad, weight, out=hidden_grad[part])
            if weight_grad is not None:
                _add_product(weight_grad, logits_grad.t(), hidden[part])
            del logits_grad  # before the next one is made
        if weight_grad is not None:
            weight_grad = weight_grad.to(weight.dtype)
        return hidden_grad, weight_grad, None, None, None, None


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

    Peak memory beyond inputs and gradients is one [chunk_tokens, V_local] fp32 block and, in bf16 or on a GPU, one more
    of the model's dtype; in bf16 also the fp32 sum of the weight's gradient, [V_local, H].

    Args:
        hidden: [S, H], the model's dtype; its gradient is this rank's part of the sum over vocabulary shards, to be
            all-reduced over `group` by the caller (Megatron's copy/gather region functions do so).
        weight: [V_local, H], this rank's rows of the output matrix, without vocabulary padding.
        target: [S] int64, token ids in the whole vocabulary.
        first_token: id of the first row of weight.
        chunk_tokens: tokens whose logits exist at one time.
        group: tensor-parallel group over which the vocabulary is sharded; every rank of it must call. None: whole.
    Returns:
        (logprobs [S], entropies [S]), fp32, nats. Gradient flows through logprobs only.
    Source: arXiv 2503.19618, the log pi of Eqs. 5 and 7.
    """
    return _ChunkedLogProb.apply(hidden, weight, target, first_token, chunk_tokens, group)
