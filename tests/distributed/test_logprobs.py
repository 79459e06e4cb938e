"""chunked_logprobs with a sharded vocabulary against log_softmax and autograd of whole logits in fp64."""

import pytest
import torch

from tests.distributed.logprobs_jobs import one_shard
from tests.support.logprob_modes import MODES, assert_near, draw, exact
from tests.support.rank_pool import on_ranks


@pytest.mark.parametrize("size", [2, 4])
def test_a_vocabulary_over_several_ranks_gives_what_one_process_gives(size):
    """1301 columns over 2 ranks: 651 and 650, each two slabs; over 4: 326 and 323, one slab.

    Hidden gradients are the sum of the ranks' parts.
    """
    inputs = draw(scale=3.0)
    expected = exact(*inputs)
    ranks = on_ranks(size, one_shard, MODES, *inputs)
    for shards in zip(*ranks, strict=True):  # of one mode
        assert [len(shard["weight_grad"]) for shard in shards] == {2: [651, 650], 4: [326, 326, 326, 323]}[size]
        found = {
            "hidden_grad": sum(shard["hidden_grad"] for shard in shards),
            "weight_grad": torch.cat([shard["weight_grad"] for shard in shards]),
        }
        for shard in shards:
            assert_near(shard | found, expected, 1e-11)
