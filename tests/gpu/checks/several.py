"""What needs several GPUs: layouts, the push of weights over NCCL, a run with servers beside it."""

import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from tests.gpu.checks.common import GPU, Report, Sizes, Skip, seconds_of
from tests.support import fork_server


def need_gpus(number: int) -> None:
    """Skip where there are fewer, unless there is none at all: then it is a dry run."""
    if GPU and torch.cuda.device_count() < number:
        raise Skip(f"needs {number} GPUs, and there are {torch.cuda.device_count()}")


def layouts(report: Report, size: Sizes, precision: str) -> None:
    """Every layout of two and four ranks over NCCL against one rank: an update's log-probs, gradient and weights.

    fp32 takes local layers, bf16 Transformer Engine's where it is installed.
    """
    need_gpus(4)
    from tests.distributed.test_layouts import EXPERTS_ON_FOUR, FOUR_PROCESSES, TWO_PROCESSES, job_of
    from tests.distributed.update_jobs import update
    from tests.support.rank_pool import RankPool

    cases = [(2, "qwen3", TWO_PROCESSES), (4, "qwen3", FOUR_PROCESSES), (4, "qwen3_moe", EXPERTS_ON_FOUR)][
        : size.layout_cases
    ]
    session = fork_server.make_session_folder()
    settings, forked = {"precision": precision}, not GPU  # a child of the fork server has no GPU
    try:
        with RankPool(1, forked=forked) as one:
            alone = {shape: one.run(update, job_of(shape, **settings))[0] for _, shape, _ in cases}
        for ranks, shape, named in cases:
            with RankPool(ranks, forked=forked) as pool:
                for name, changes in list(named.items())[: size.layouts]:
                    found = same(pool.run(update, job_of(shape, **settings, **changes))[0], alone[shape])
                    report[f"{shape}: {name}"] = found
                    bound = 1e-3 if precision == "fp32" else 0.1
                    report.expect(found["grad_norm"] < bound, f"{shape}: {name}: the gradient is that of one rank")
                    report.expect(found["movement"] > 1 - bound / 2, f"{shape}: {name}: weights move as on one rank")
    finally:
        fork_server.remove_session_folder(session)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """How near two updates are: relative difference of the gradient's norm, cosine of all movements."""
    names = sorted(name for name in expected if name.startswith("moved/"))
    moved, reference = (torch.cat([update[name].double().flatten() for name in names]) for update in (found, expected))
    return {
        "grad_norm": abs(float(found["grad_norm"] / expected["grad_norm"]) - 1),
        "movement": float(torch.cosine_similarity(moved, reference, dim=0)),
    }


def refit(report: Report, size: Sizes) -> None:
    """Weights of a trainer on GPU 0 to two servers in one group, on GPU 1 and on GPUs 2 and 3; then one is killed."""
    need_gpus(4)
    if importlib.util.find_spec("vllm") is None:
        raise Skip("vLLM is not installed")
    from nemo_jepo.config.schema import VLLMConfig
    from nemo_jepo.rollout.vllm.pool import Pool
    from nemo_jepo.rollout.vllm.push import WeightTransfer
    from tests.support.serving import KEY, VOCAB, start_server, tiny_model, wait_for

    with tempfile.TemporaryDirectory() as folder:
        root, servers = Path(folder), []
        models = [tiny_model(root / f"model_{seed}", "llama", True, seed) for seed in (1, 2)]
        for number, gpus in enumerate(("1", "2,3")):
            ranks = str(len(gpus.split(","))) if GPU else "1"
            options = ["--tensor-parallel-size", ranks]
            options += ["--", "--gpu-memory-utilization", "0.3"] if GPU else []
            own = {"CUDA_VISIBLE_DEVICES": gpus} if GPU else {}
            servers.append(start_server(root / "model_1", *options, log=root / f"{number}.log", environment=own))
        try:
            wait_for(servers)
            urls = tuple(server.url for server in servers)
            pool = Pool(urls, VLLMConfig(), KEY, VOCAB)
            shapes = [(name, tuple(tensor.shape)) for name, tensor in models[0].named_parameters()]
            transfer = WeightTransfer(pool.control, VLLMConfig(sync_timeout_s=120), shapes, torch.float32, root / "w")
            push_and_kill(report, transfer, models, servers, pool)
            pool.close()
        finally:
            for server in servers:
                server.process.terminate()
            for server in servers:
                server.process.wait()


def push_and_kill(report: Report, transfer: Any, models: list[Any], servers: list[Any], pool: Any) -> None:
    """Three pushes to both servers, one in which the first dies, and the same once more to the other."""
    from tests.support.serving import logprobs

    urls = tuple(server.url for server in servers)

    def stream(model: Any, meanwhile: Callable[[], None] | None = None) -> Iterator[tuple[str, Tensor]]:
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if number == 5 and meanwhile is not None:
                meanwhile()
            yield name, parameter.detach().to("cuda" if GPU else "cpu")

    def kill() -> None:
        for process in psutil.Process(servers[0].process.pid).children(recursive=True):
            process.kill()

    def error(url: str, model: Any, version: int) -> float:
        from nemo_jepo.rollout.sampler import GenerationRequest
        from nemo_jepo.types import Prompt

        pool.admit(url, version)
        request = GenerationRequest(4, max_tokens=20, stop_at_marker=False, temperature=1.0, seed=0)
        drawn = pool.submit([Prompt(0, tuple(range(1, 40)), "", "")], request, (), only=url).result()
        own = [torch.tensor(r.generation_logprobs) - logprobs(model, tuple(range(1, 40)), r.token_ids) for r in drawn]
        return torch.cat(own).abs().mean().item()

    for version, model in enumerate((models[1], models[0], models[1])):
        begin = time.monotonic()
        report.expect(transfer.push(urls, stream(model), version).updated == urls, f"push {version} reaches both")
        report[f"seconds of push {version}"] = time.monotonic() - begin
        report[f"nats after push {version}"] = [error(url, model, version) for url in urls]
        report.expect(max(report[f"nats after push {version}"]) < 0.01, f"both sample with push {version}")
    begin = time.monotonic()
    pushed = transfer.push(urls, stream(models[0], kill), 3)
    report["seconds until the dead server was known"] = time.monotonic() - begin
    report["the dead server"] = dict(pushed.lost)
    report.expect(tuple(pushed.lost) == urls[:1] and pushed.waiting == urls[1:], "only the dead server is lost")
    report.expect(transfer.push(urls[1:], stream(models[0]), 3).updated == urls[1:], "the other gets the weights")
    report["nats after the loss"] = error(urls[1], models[0], 3)
    report.expect(report["nats after the loss"] < 0.01, "the other samples with them")
    if GPU:
        report["seconds of a device synchronisation afterwards"] = seconds_of(lambda: None)


def run_with_servers(report: Report, size: Sizes) -> None:
    """JEPO on two ranks of tensor parallelism, with two servers that the run starts itself on the other GPUs."""
    need_gpus(4)
    if importlib.util.find_spec("vllm") is None:
        raise Skip("vLLM is not installed")
    from tests.support.command_line import metrics
    from tests.support.ranks import run_ranks
    from tests.support.vllm_processes import SHAPE

    with tempfile.TemporaryDirectory() as folder:
        settings = ["--config-name=demo", "rollout=vllm", "rollout.vllm.num_servers=2", "trainer.devices=2"]
        settings += ["model.tensor_model_parallel_size=2", "trainer.precision=bf16", f"exp_manager.exp_dir={folder}"]
        settings += ["exp_manager.name=run", f"warmup.max_steps={size.warmup_steps}", "rollout.max_tokens=40"]
        settings += [f"trainer.jepo.max_steps={size.run_steps}", "trainer.jepo.val_check_interval=0", *SHAPE]
        begin = time.monotonic()
        run_ranks(2, ["-m", "nemo_jepo.cli", "train", *settings], timeout=280, forked=False)
        report["seconds"] = time.monotonic() - begin
        lines = metrics(Path(folder))
    report["last line"] = {name: value for name, value in lines[-1].items() if "logprob_diff" in name or "tim" in name}
    report.expect(len(lines) >= size.run_steps, "every step was made, its servers' weights compared")
