"""Log-probs of given tokens from hidden states, without full-vocabulary logits of the whole row.

The output head runs over a few tokens at a time; the backward pass recomputes each chunk's logits. With tensor
parallelism every rank holds V_local columns of the vocabulary and only three numbers a token are all-reduced.

Shape letters: S scored tokens, H hidden size, V vocabulary, V_local its columns on this rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


def _logits(hidden: Tensor, weight: Tensor, block: Tensor) -> Tensor:
    """fp32 logits [chunk, V_local] in block's first rows; the product runs in the model's precision."""
    logits = block[: hidden.shape[0]]
    if weight.dtype == logits.dtype:
        return torch.mm(hidden, weight.t(), out=logits)
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


def _gradient_sum(weight: Tensor) -> Tensor:
    """Zeros that the chunks' gradients of the output matrix are added to."""
    return torch.zeros_like(weight)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    total.addmm_(left, right)


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
            logits.sub_(largest[:, None])
            column, here = _local_target(target[part], first_token, weight.shape[0])
            target_logit = torch.where(here, logits.gather(1, column[:, None])[:, 0], 0.0)
            # With e_v = exp(z_v - m): sum_v e_v, sum_v -e_v log e_v, z_target - m; one all-reduce for the three.
            exponential_sum = logits.exp_().sum(1)
            sums = torch.stack([exponential_sum, torch.special.entr(logits, out=logits).sum(1), target_logit])
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
        weight_grad = _gradient_sum(weight) if ctx.needs_input_grad[1] else None
        block = _logit_block(hidden, weight, ctx.chunk_tokens)
        for start in range(0, target.shape[0], ctx.chunk_tokens):
            part = slice(start, start + ctx.chunk_tokens)
            grad = grad_logprobs[part, None]
            # d log p(target) / d z_v = 1{v = target} - p_v
            logits_grad = _logits(hidden[part], weight, block).sub_(log_normalizers[part, None]).exp_().mul_(-grad)
            column, here = _local_target(target[part], ctx.first_token, weight.shape[0])
            logits_grad.scatter_add_(1, column[:, None], torch.where(here[:, None], grad, 0.0))
            logits_grad = logits_grad.to(weight.dtype)
            if hidden_grad is not None:
                torch.mm(logits_grad, weight, out=hidden_grad[part])
            if weight_grad is not None:
                _add_product(weight_grad, logits_grad.t(), hidden[part])
        return hidden_grad, weight_grad, None, None, None, None


def chunked_logprobs(
    hidden: Tensor, weight: Tensor, target: Tensor, first_token: int, chunk_tokens: int, group: Group = None
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target token and entropy of the distribution it is scored under.

        logprob_s = z_s[target_s] - log sum_v exp z_s[v],   z_s = weight . hidden_s   (fp32 log-sum-exp)
        entropy_s = - sum_v p_s[v] log p_s[v]

    Peak memory beyond inputs and gradients is one [chunk_tokens, V_local] fp32 block, and in bf16 one more of bf16.

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
