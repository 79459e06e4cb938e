"""All ranks together: can they talk, how fast, and do they see the same files. Every function: all ranks."""

import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from nemo_jepo.actor.parallel import Layout
from nemo_jepo.tools.doctor.findings import BLOCKER, OK, Finding
from nemo_jepo.tools.doctor.machine import existing_parent

REPETITIONS = 5


def check_groups(layout: Layout) -> Iterator[Finding]:
    """Bus bandwidth of an all-reduce over each kind of group, the slowest of its groups.

    bytes a second = 2 (n - 1) / n * bytes / seconds
    """
    groups = {
        "tensor": layout.tensor_group,
        "pipeline": layout.pipeline_group,
        "context": layout.context_group,
        "expert": layout.expert_group,
        "data": layout.data_group,
        "world": dist.group.WORLD,
    }
    for name, group in groups.items():
        size = group.size()
        seconds = torch.tensor([_all_reduce_seconds(group, layout.device) if size > 1 else 0.0])
        seconds = seconds.to(layout.device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        if size > 1:
            bandwidth = 2 * (size - 1) / size * _num_bytes(layout.device) / seconds.item()
            yield Finding(OK, "all-reduce", f"{name} groups of {size}: {bandwidth / 1e9:.2f} GB/s")


def _num_bytes(device: torch.device) -> int:
    return 256 * 2**20 if device.type == "cuda" else 4 * 2**20


def _all_reduce_seconds(group: dist.ProcessGroup, device: torch.device) -> float:
    """Median seconds."""
    tensor = torch.ones(_num_bytes(device) // 4, device=device)
    seconds = []
    for _ in range(REPETITIONS):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[REPETITIONS // 2]


def check_shared_folder(folder: Path, deadline_s: float = 30.0) -> Iterator[Finding]:
    """Whether every rank sees what rank 0 writes into the folder of checkpoints."""
    name = [f".nemo-jepo-doctor-{secrets.token_hex(4)}"]
    dist.broadcast_object_list(name, src=0)
    place = existing_parent(folder)
    probe = place / name[0]
    try:
        if dist.get_rank() == 0:
            probe.write_text(name[0])
        dist.barrier()
        deadline = time.monotonic() + deadline_s
        while not (seen := probe.exists()) and time.monotonic() < deadline:
            os.listdir(place)  # a network file system may remember that it was not there
            time.sleep(0.2)
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            probe.unlink(missing_ok=True)
    if seen:
        yield Finding(OK, "shared folder", f"{place} is the same on all nodes")
    else:
        fix = "Put exp_manager.exp_dir on a file system that all nodes mount"
        yield Finding(BLOCKER, "shared folder", f"what rank 0 writes into {place} is not seen here", fix)
