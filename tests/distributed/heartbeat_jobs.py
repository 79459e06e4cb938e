"""A rank that takes steps with the others under a heartbeat, and may fall asleep in one."""

import itertools
import os
import socket
import time

import torch.distributed as dist

from nemo_jepo.actor.heartbeat import heartbeat
from nemo_jepo.actor.parallel import init_distributed
from nemo_jepo.utils.phases import phase


def take_steps(
    timeout_s: float, sleeper: int = -1, num_steps: int | None = None, last_rank: int = -1, cut: bool = False
) -> None:
    """A process's whole work.

    Args:
        timeout_s: of the heartbeat.
        sleeper: the rank that falls asleep in a step.
        num_steps: None for as many as there is time for.
        last_rank: the one that stays for longer than the timeout when the others have ended.
        cut: the heartbeat's connection to the store breaks.
    """
    init_distributed()
    before = sockets()
    with heartbeat(timeout_s):
        for number in sockets() - before if cut and dist.get_rank() else ():
            with socket.socket(fileno=os.dup(number)) as own:
                own.shutdown(socket.SHUT_RDWR)
        for step in itertools.count() if num_steps is None else range(num_steps):
            with phase("generate"):
                time.sleep(0.01)
            with phase("train_time"):
                if step == 200:  # every rank has heard of the others by then
                    print("goes on", flush=True)
                    if dist.get_rank() == sleeper:
                        fall_asleep()
                dist.barrier()
        if dist.get_rank() == last_rank:
            time.sleep(2 * timeout_s)


def sockets() -> set[int]:
    """Descriptors of this process's sockets."""
    numbers = map(int, os.listdir("/proc/self/fd"))
    return {number for number in numbers if is_socket(number)}


def is_socket(number: int) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{number}").startswith("socket:")
    except FileNotFoundError:
        return False  # it was that of the folder


def fall_asleep() -> None:
    time.sleep(600)
