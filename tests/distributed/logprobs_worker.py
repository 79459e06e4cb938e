"""chunked_logprobs with its vocabulary over 2 and over 3 of 3 ranks. Run by test_logprobs.

python logprobs_worker.py FOLDER     (once a rank; writes FOLDER/{ranks}_{rank}.safetensors)
"""

import sys

import torch.distributed as dist
from safetensors.torch import save_file

from nemo_jepo.actor.logprobs import chunked_logprobs
from tests.distributed.test_logprobs import V, case

if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for size in (2, 3):
        group = dist.new_group(list(range(size)))
        if rank >= size:
            continue
        hidden, weight, target, upstream = case(scale=3.0)
        columns = -(-V // size)
        shard = weight[rank * columns : (rank + 1) * columns].clone().requires_grad_()
        logprobs, entropies = chunked_logprobs(
            hidden.requires_grad_(), shard, target, rank * columns, chunk_tokens=4, group=group
        )
        logprobs.backward(upstream)
        out = {"logprobs": logprobs.detach(), "entropies": entropies}
        out |= {"hidden_grad": hidden.grad, "weight_grad": shard.grad}
        save_file(out, f"{sys.argv[1]}/{size}_{rank}.safetensors")
    dist.destroy_process_group()
