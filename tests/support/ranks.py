"""Start real processes that talk over gloo, and read what rank 0 wrote."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from nemo_jepo.utils.network import free_ports

ROOT = Path(__file__).parents[2]


WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def run_ranks(
    world_size: int, command: list[str], timeout: float = 240, environment: Mapping[str, str] | None = None
) -> str:
    """Run `python *command` once a rank, with torchrun's variables set; the output of all ranks if all end well.

    Args:
        environment: variables beside those of this process.
    """
    port = str(*free_ports())
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    shared = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    shared |= environment or {}
    processes: list[subprocess.Popen[str]] = []
    files = [tempfile.TemporaryFile("w+") for _ in range(world_size)]
    for rank in range(world_size):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(
            subprocess.Popen(
                [sys.executable, *command],
                env=shared | place,
                stdout=files[rank],
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        deadline = time.monotonic() + timeout
        while any(process.poll() is None for process in processes):
            if any(process.returncode for process in processes) or time.monotonic() > deadline:
                break  # the others would wait for the dead one
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    outputs = []
    for file in files:
        file.seek(0)
        outputs.append(file.read())
        file.close()
    failed = [
        f"rank {rank} ended with {process.returncode}:\n{output[-4000:]}"
        for rank, (process, output) in enumerate(zip(processes, outputs, strict=True))
        if process.returncode
    ]
    assert not failed, "\n".join(failed)
    return "\n".join(outputs)
