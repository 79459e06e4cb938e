"""This node: GPUs, room for checkpoints, speed of the file system, ports."""

import dataclasses
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import torch

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import Config
from nemo_jepo.tools.doctor.findings import BLOCKER, OK, WARNING, Finding
from nemo_jepo.tools.plan.estimate import cluster_of, estimate
from nemo_jepo.tools.plan.hardware import GPUS
from nemo_jepo.tools.plan.workload import MeanLengths

GIB = 2**30
PROBE_BYTES = 64 * 2**20
SLOW_BYTES_PER_S = 50e6
"""A file system below it makes a checkpoint of a 70B model take hours."""


def check_gpus(devices: int) -> Iterator[Finding]:
    """Kind, memory and number of GPUs, and the NCCL that drives them.

    Args:
        devices: trainer.devices.
    """
    if not torch.cuda.is_available():
        text = f"none: {devices} trainer {'process' if devices == 1 else 'processes'} over gloo"
        yield Finding(OK, "GPU", f"{text}, {os.cpu_count()} cores")
        return
    count = torch.cuda.device_count()
    properties = torch.cuda.get_device_properties(0)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    text = (
        f"{count} x {properties.name}, {properties.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda}, NCCL {nccl}"
    )
    yield Finding(OK, "GPU", text)
    if devices > count:
        fix = "Lower trainer.devices, or ask for more GPUs"
        yield Finding(BLOCKER, "GPU", f"trainer.devices={devices}, and this node has {count}", fix)
    for number in range(min(count, devices)):
        free, total = torch.cuda.mem_get_info(number)
        if free < 0.9 * total:
            text = f"{(total - free) / GIB:.0f} of {total / GIB:.0f} GiB of GPU {number} are taken"
            yield Finding(WARNING, "GPU", text, "End what runs there (nvidia-smi)")


def check_cudnn() -> Iterator[Finding]:
    """Whether torch and Transformer Engine have loaded one cuDNN; nothing where none is loaded.

    Parts of two versions in one process refuse each other in the first attention
    (CUDNN_STATUS_SUBLIBRARY_VERSION_MISMATCH).
    """
    if torch.cuda.is_available():
        with suppress(ImportError):
            import transformer_engine.pytorch  # noqa: F401
    maps = Path("/proc/self/maps")
    folders = cudnn_folders(maps.read_text()) if maps.exists() else []
    if len(folders) == 1:
        yield Finding(OK, "cuDNN", f"{torch.backends.cudnn.version()}, {folders[0]}")
    elif folders:
        text = f"parts of two installations are loaded, which refuse each other: {' and '.join(folders)}"
        yield Finding(BLOCKER, "cuDNN", text, "Remove one, or put torch's first into LD_LIBRARY_PATH")


def cudnn_folders(maps: str) -> list[str]:
    """The folders of a process's cuDNN libraries, from /proc/PID/maps."""
    files = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/libcudnn" in line}
    return sorted({str(Path(file).parent) for file in files})


def check_memory(config: Config) -> Iterator[Finding]:
    """Whether the run has room on GPUs like this node's, by the planner's model; nothing on a node without any.

    It warns and does not block: a model's error (docs/reference/planner.md) is no reason to refuse a run.
    """
    if not torch.cuda.is_available():
        return
    properties = torch.cuda.get_device_properties(0)
    gpu = dataclasses.replace(
        GPUS["h100"], name=properties.name, memory=properties.total_memory
    )  # no time is asked for
    rollout_nodes = 0 if isinstance(config.rollout.servers, str) else 1  # any number of them: all are alike
    cluster = cluster_of(config, gpu, torch.cuda.device_count(), None, 0)
    cluster = dataclasses.replace(cluster, rollout_nodes=rollout_nodes)
    try:
        plan = estimate(config, cluster, MeanLengths())
    except ConfigError:
        return  # a rule of the settings, which has its own line
    phase = plan.worst
    where = "a rollout GPU" if phase is plan.sampler_memory else "a trainer GPU"
    text = (
        f"{phase.total / GIB:.0f} of {phase.capacity / GIB:.0f} GiB of {where} in {phase.name}, by the planner's model"
    )
    if phase.short:
        yield Finding(WARNING, "memory", text, "nemo-jepo plan with the same arguments says what to try")
    else:
        yield Finding(OK, "memory", text)


def existing_parent(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def check_disk(folder: Path, num_parameters: int | None, config: Config) -> Iterator[Finding]:
    """Room for the checkpoints that the run keeps, and one more while it is written.

        bytes = (keep + 1) * parameters * (weights + 12),  12: fp32 main weights and two moments

    Args:
        num_parameters: of the whole model, None where it is not known.
    """
    place = existing_parent(folder)
    if not os.access(place, os.W_OK):
        fix = "Give another exp_manager.exp_dir"
        yield Finding(BLOCKER, "disk", f"{place} cannot be written", fix)
        return
    free = shutil.disk_usage(place).free
    if num_parameters is None:
        yield Finding(OK, "disk", f"{free / GIB:.1f} GiB free at {place}")
        return
    size = num_parameters * ((2 if config.trainer.precision == "bf16" else 4) + 12)
    needed = (config.trainer.jepo.keep_checkpoints + 1) * size
    text = f"{free / GIB:.1f} GiB free at {place}, {needed / GIB:.1f} needed for checkpoints of {size / GIB:.1f} GiB"
    if free < needed:
        fix = "Make room, lower trainer.jepo.keep_checkpoints, or give another exp_manager.exp_dir"
        yield Finding(BLOCKER, "disk", text, fix)
    else:
        yield Finding(OK, "disk", text)


def check_file_system(folder: Path) -> Iterator[Finding]:
    """Bytes a second of one process that writes a file, waits for the disk, and reads it back."""
    place = existing_parent(folder)
    probe = place / f".nemo-jepo-doctor-{socket.gethostname()}-{os.getpid()}"
    block = os.urandom(PROBE_BYTES)
    try:
        began = time.perf_counter()
        with probe.open("wb") as file:
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
        written = time.perf_counter()
        same = probe.read_bytes() == block
        read = time.perf_counter()
    except OSError as error:
        yield Finding(
            BLOCKER, "file system", f"{place} cannot be written ({error})", "Give another exp_manager.exp_dir"
        )
        return
    finally:
        probe.unlink(missing_ok=True)
    if not same:
        yield Finding(BLOCKER, "file system", f"{place} gives back other bytes than were written", "Use another one")
        return
    speed = PROBE_BYTES / (written - began)
    text = f"{place}: writes {speed / 1e6:.0f} MB/s, reads {PROBE_BYTES / (read - written) / 1e6:.0f} MB/s (cached)"
    slow = speed < SLOW_BYTES_PER_S
    yield Finding(WARNING if slow else OK, "file system", text, "Checkpoints will be slow" if slow else "")


def check_ports(config: Config) -> Iterator[Finding]:
    """The rendezvous port can be opened by rank 0; named rollout servers can be reached."""
    port = int(os.environ.get("MASTER_PORT", "0"))
    if port and os.environ.get("RANK", "0") == "0":
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
                yield Finding(OK, "ports", f"MASTER_PORT={port} is free")
            except OSError as error:
                yield Finding(BLOCKER, "ports", f"MASTER_PORT={port} cannot be opened ({error})", "Choose another")
    if not config.rollout.kind.has_servers:
        return
    for url in config.rollout.server_urls() or ():
        address = urlsplit(url)
        try:
            socket.create_connection((address.hostname or "", address.port or 80), timeout=5).close()
            yield Finding(OK, "ports", f"{url} answers")
        except OSError as error:
            fix = "Start it (nemo-jepo serve), or open the port; a run waits rollout.vllm.start_timeout_s for it"
            yield Finding(WARNING, "ports", f"{url} does not answer ({error})", fix)
