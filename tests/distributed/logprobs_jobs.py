"""chunked_logprobs with its vocabulary over several ranks."""

import torch
import torch.distributed as dist

from nemo_jepo.actor.logprobs import chunked_logprobs


def one_shard(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, upstream: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Values and gradients on this rank, which holds its part of the vocabulary."""
    rank, columns = dist.get_rank(), -(-len(weight) // dist.get_world_size())
    shard = weight[rank * columns : (rank + 1) * columns].clone().requires_grad_()
    logprobs, entropies = chunked_logprobs(
        hidden.requires_grad_(), shard, target, rank * columns, chunk_tokens=4, group=dist.group.WORLD
    )
    logprobs.backward(upstream)
    out = {"logprobs": logprobs.detach(), "entropies": entropies}
    return out | {"hidden_grad": hidden.grad, "weight_grad": shard.grad}
