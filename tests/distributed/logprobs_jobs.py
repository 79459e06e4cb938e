"""chunked_logprobs with its vocabulary over several ranks."""

import torch.distributed as dist
from torch import Tensor

from tests.support.logprob_modes import Found, Mode, chunked


def one_shard(modes: list[Mode], hidden: Tensor, weight: Tensor, target: Tensor, token_weights: Tensor) -> list[Found]:
    """Values and gradients of every mode on this rank, which holds its part of the vocabulary."""
    rank, columns = dist.get_rank(), -(-len(weight) // dist.get_world_size())
    shard = weight[rank * columns : (rank + 1) * columns]
    rest = {"first_token": rank * columns, "group": dist.group.WORLD}
    return [chunked(mode, hidden, shard, target, token_weights, **rest) for mode in modes]
