"""What ranks do to prove how a pool of them behaves."""

import os
import random
import time
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_jepo.actor import parallel
from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import ModelConfig


def where() -> tuple[int, int, float]:
    """Process, rank, and a sum over the ranks."""
    total = torch.ones(1)
    dist.all_reduce(total)
    return os.getpid(), dist.get_rank(), total.item()


def from_first_rank() -> tuple[object, str]:
    """What rank 0's call gave, and the line of a ConfigError of rank 0, as this rank got them."""

    def refuse() -> None:
        raise ConfigError("key", dist.get_rank(), "is wrong", "Change it")

    try:
        parallel.on_first_rank(refuse)
        line = ""
    except ConfigError as error:
        line = str(error)
    return parallel.on_first_rank(lambda: {"rank": dist.get_rank()}), line


def leave_everything_behind() -> None:
    parallel.init_model_parallel(ModelConfig(tensor_model_parallel_size=2))
    os.environ["LEFT"] = "1"
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(dist.get_rank())


def found() -> dict[str, Any]:
    return {
        "environment": os.environ.get("LEFT"),
        "folder": os.getcwd(),
        "layout": parallel_state.is_initialized(),
        "groups": len(dist.distributed_c10d._world.pg_map),
        "draws": (torch.rand(1).item(), random.random()),
    }


def raise_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank 1 says no")
    where()


def end_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(9)
    where()


def hang() -> None:
    time.sleep(1000)
