"""What checkpoint.verify_on_load costs: loading a checkpoint of random weights with its checksums and without.

    python -m benchmarks.load_checkpoint [--gb 2] [--pairs 5] [--folder FOLDER]

Each pair loads the same checkpoint with own and with none, in turns. Every load has the files out of the page cache
first, as far as the kernel does what it is asked (posix_fadvise). Wall seconds, and CPU seconds of the process.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from nemo_jepo.actor.parallel import init_distributed
from nemo_jepo.checkpoint.hf.torch_dist import SerialSave
from nemo_jepo.checkpoint.reader import load_shards
from nemo_jepo.checkpoint.writer import save_with

NUM_TENSORS = 64


def main() -> None:
    """Print the medians and the least and most of each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--gb", type=float, default=2.0, help="size of the checkpoint, 10^9 bytes (%(default)s)")
    parser.add_argument("--pairs", type=int, default=5, help="%(default)s")
    parser.add_argument("--folder", help="where it is written; default: the system's folder for temporary files")
    args = parser.parse_args()
    init_distributed()
    rows = int(args.gb * 1e9 / NUM_TENSORS / 2 / 1024)
    weights = [torch.empty(rows, 1024, dtype=torch.bfloat16).normal_() for _ in range(NUM_TENSORS)]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = save_with(SerialSave(), Path(folder), 0, shards(weights), lambda _: None)
        taken: dict[str, list[tuple[float, float]]] = {"own": [], "none": []}
        for _ in range(args.pairs):
            for verify, seconds in taken.items():
                forget(path)
                wall, cpu = time.perf_counter(), time.process_time()
                load_shards(path, shards(weights), verify)
                seconds.append((time.perf_counter() - wall, time.process_time() - cpu))
    for clock, unit in enumerate(("wall s", "CPU s")):
        own, none = ([pair[clock] for pair in taken[verify]] for verify in ("own", "none"))
        ratios = [one / other for one, other in zip(own, none, strict=True)]
        print(f"{unit}: own {told(own)}, none {told(none)}, own / none {told(ratios)}")


def shards(weights: list[torch.Tensor]) -> dict[str, ShardedTensor]:
    """The weights as one rank has them."""
    return {f"w{number}": ShardedTensor.from_rank_offsets(f"w{number}", w) for number, w in enumerate(weights)}


def forget(path: Path) -> None:
    """Take a folder's files out of the page cache."""
    os.sync()
    for file in path.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def told(values: list[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


if __name__ == "__main__":
    main()
