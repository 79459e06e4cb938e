"""Host memory of `nemo-jepo import` and `nemo-jepo export` on a random model, against the rank's share and one bucket.

    python -m benchmarks.convert_memory [--hidden 2048] [--layers 16] [--tensor-parallel 1 2] [--out FILE]

The model's folder is drawn tensor by tensor and deleted afterwards. Each rank is a process of its own that takes its
memory before any weights exist and is sampled from then on. What counts is anonymous memory (RssAnon of
/proc/self/status): pages of the mapped safetensors files are in RSS too, but the kernel drops them whenever it needs
them, and how many there are at a moment says nothing of the program. Linux without a GPU only.

    share    the rank's parameters, in the model's precision
    bound    (share + one bucket of 1 GiB) * 1.2
"""

import argparse
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from benchmarks import report
from nemo_jepo.utils.network import free_ports

BUCKET = 1 << 30
SAMPLE_S = 0.005


@dataclass(frozen=True, slots=True)
class Size:
    """The model; the defaults are Llama 3.2's 1B with a smaller vocabulary and a head of its own: 2.5 GB in bf16."""

    hidden: int = 2048
    layers: int = 16
    inner: int = 8192
    heads: int = 32
    kv_heads: int = 8
    vocab: int = 64_000

    def config(self) -> LlamaConfig:
        config = LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            intermediate_size=self.inner,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab,
            tie_word_embeddings=False,
            architectures=["LlamaForCausalLM"],
        )
        config.dtype = torch.bfloat16
        return config


def write_model(size: Size, folder: Path) -> None:
    """A folder of random bf16 weights in shards of one bucket; holds one tensor at a time."""
    from nemo_jepo.actor.weights.load import hf_shapes
    from nemo_jepo.checkpoint.hf.export import export_hf

    config, companions = size.config(), folder.with_name("companions")
    config.save_pretrained(companions)
    shapes = hf_shapes(config)

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            yield name, torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.1, 0.1)

    export_hf(stream(), shapes, torch.bfloat16, folder, companions)


def anonymous_bytes() -> int:
    """This process's anonymous memory now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@contextmanager
def sampled(metrics: report.Metrics) -> Iterator[None]:
    """Adds "bytes", the most that this process held over what it held before, and "seconds"."""
    before, begin, done = anonymous_bytes(), perf_counter(), threading.Event()
    peak = before

    def sample() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_S):
            peak = max(peak, anonymous_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield
    finally:
        done.set()
        sampler.join()
    metrics |= {"bytes": max(peak, anonymous_bytes()) - before, "seconds": perf_counter() - begin}


def run_rank(rank: int, ranks: int, port: str, command: str, source: str, target: str, out: str) -> None:
    """One rank of one command, with its metrics written to `out`.rank."""
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    from nemo_jepo.actor import parallel
    from nemo_jepo.checkpoint import convert

    parallel.init_distributed()
    torch.distributed.barrier()
    metrics: report.Metrics = {}
    share = 0
    build = convert._build_actor

    def counted(*arguments: Any) -> Any:
        nonlocal share
        actor = build(*arguments)
        share = sum(p.numel() * p.element_size() for chunk in actor.chunks for p in chunk.parameters())
        return actor

    convert._build_actor = counted
    run = convert.import_hf if command == "import" else convert.export_hf_folder
    with sampled(metrics):
        run(Path(source), Path(target), [f"model.tensor_model_parallel_size={ranks}"])
    Path(f"{out}.{rank}").write_text(json.dumps(metrics | {"share": share}))


def measure(command: str, ranks: int, source: Path, target: Path) -> list[report.Metrics]:
    """Every rank's metrics of one command in fresh processes."""
    port = str(*free_ports())
    out = target.with_name(f"{target.name}.metrics")
    spawn = get_context("spawn")
    processes = [
        spawn.Process(target=run_rank, args=(rank, ranks, port, command, str(source), str(target), str(out)))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert not any(process.exitcode for process in processes), f"{command} on {ranks} ranks failed"
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(ranks)]


def run(size: Size, tensor_parallel: list[int], folder: Path) -> dict[str, Any]:
    """The whole report; several GB under `folder` while it runs."""
    before = report.machine()
    with tempfile.TemporaryDirectory(dir=folder) as name:
        root = Path(name)
        write_model(size, root / "model")
        model_bytes = sum(file.stat().st_size for file in (root / "model").glob("*.safetensors"))
        found: dict[str, list[report.Metrics]] = {}
        for ranks in tensor_parallel:
            checkpoint, back = root / f"checkpoint_{ranks}", root / f"back_{ranks}"
            for command, source, target in (("import", root / "model", checkpoint), ("export", checkpoint, back)):
                print(f"{command}, {ranks} ranks ...", file=sys.stderr, flush=True)
                found[f"{command} TP{ranks}"] = measure(command, ranks, source, target)
    for metrics in (metrics for ranks_metrics in found.values() for metrics in ranks_metrics):
        metrics["bound"] = 1.2 * (metrics["share"] + BUCKET)
    return {
        "benchmark": "convert_memory",
        "machine": before | {"load_after": report.machine()["load"]},
        "size": asdict(size),
        "memory": "RssAnon: anonymous pages over those before any weights, by rank",
        "model_bytes": model_bytes,
        "bucket": BUCKET,
        "ranks": found,
    }


def show(found: dict[str, Any]) -> str:
    """The report as a table."""
    rows = [["", "share", "peak", "over the share", "bound", "seconds"]]
    for name, ranks in found["ranks"].items():
        for rank, metrics in enumerate(ranks):
            sizes = (metrics["share"], metrics["bytes"], metrics["bytes"] - metrics["share"], metrics["bound"])
            cells = [f"{value / 1e6:.0f} MB" for value in sizes]
            rows.append([f"{name} rank {rank}", *cells, f"{metrics['seconds']:.1f}"])
    return report.table(rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in asdict(Size()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--tensor-parallel", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path)
    options = vars(parser.parse_args(arguments))
    tensor_parallel, folder, out = (options.pop(name) for name in ("tensor_parallel", "folder", "out"))
    found = run(Size(**options), tensor_parallel, folder)
    report.write(found, out)
    print(show(found))


if __name__ == "__main__":
    main()
