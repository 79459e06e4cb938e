"""A rank that takes steps with the others under a heartbeat, and may fall asleep in one."""

import itertools
import time

import torch.distributed as dist

from nemo_jepo.actor.heartbeat import heartbeat
from nemo_jepo.actor.parallel import init_distributed
from nemo_jepo.utils.phases import phase


def take_steps(timeout_s: float, sleeper: int = -1, num_steps: int | None = None, last_rank: int = -1) -> None:
    """A process's whole work.

    Args:
        timeout_s: of the heartbeat.
        sleeper: the rank that falls asleep in a step.
        num_steps: None for as many as there is time for.
        last_rank: the one that stays for longer than the timeout when the others have ended.
    """
    init_distributed()
    with heartbeat(timeout_s):
        for step in itertools.count() if num_steps is None else range(num_steps):
            with phase("generate"):
                time.sleep(0.01)
            with phase("train_time"):
                if step == 20:
                    print("goes on", flush=True)
                    if dist.get_rank() == sleeper:
                        fall_asleep()
                dist.barrier()
        if dist.get_rank() == last_rank:
            time.sleep(2 * timeout_s)


def fall_asleep() -> None:
    time.sleep(600)
