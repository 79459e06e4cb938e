"""Whole runs, and a checkpoint that crosses from a CPU's layers to Transformer Engine's."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from tests.gpu.checks.common import ROOT, Report, Sizes, Skip
from tests.gpu.checks.parity import suite


def cpu_checkpoint(report: Report, size: Sizes) -> None:
    """A checkpoint that a CPU wrote, with local layers, is read here into whatever layers serve, and back."""
    from nemo_jepo.actor import parallel

    parallel.init_distributed()
    from nemo_jepo.actor.actor import MegatronJEPOActor
    from nemo_jepo.actor.model import load_hf_config
    from nemo_jepo.actor.weights.load import load_stage, open_source
    from nemo_jepo.actor.weights.stream import weight_stream
    from nemo_jepo.checkpoint.format import latest_checkpoint
    from nemo_jepo.checkpoint.writer import CheckpointWriter, RunState, load_checkpoint
    from nemo_jepo.config.schema import ModelConfig
    from tests.support.hf_models import random_model, save

    def command(*words: str) -> None:
        ended = subprocess.run(
            [sys.executable, "-m", "nemo_jepo.cli", *words],
            cwd=ROOT,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
        )
        if ended.returncode:
            raise RuntimeError((ended.stdout + ended.stderr)[-2500:])

    def actor_of(folder: str) -> Any:
        model = ModelConfig(tokens_per_micro_batch=256)
        parallel.init_model_parallel(model)
        return MegatronJEPOActor(load_hf_config(folder), model, "bf16", parallel.Layout())

    def same(actor: Any, folder: str) -> bool:
        other = actor_of(folder)
        load_stage(other.chunks, other.hf_config, open_source(other.hf_config, folder, 0), other.layout)
        pairs = zip(
            *(dict(weight_stream(a.chunks, a.hf_config, a.layout)).items() for a in (actor, other)), strict=True
        )
        return all(name == other_name and torch.equal(own, its) for (name, own), (other_name, its) in pairs)

    for family in size.crossing:
        with tempfile.TemporaryDirectory() as root:
            folder = save(random_model(f"{family} untied").bfloat16(), Path(root) / "hf")
            command("import", folder, f"{root}/imported")
            actor = actor_of(folder)
            path = next(Path(root, "imported").glob("**/complete.json")).parent
            actor.load_weights(load_checkpoint(path, {"model": actor.sharded_weights()}).sharded["model"])
            here = type(actor.chunks[0].decoder.layers[0].self_attention.core_attention).__name__
            report[family] = {"attention here": here, "weights of the CPU's checkpoint": same(actor, folder)}
            report.expect(report[family]["weights of the CPU's checkpoint"], f"{family}: a CPU's checkpoint is read")
            writer = CheckpointWriter(Path(root) / "own", 1, actor.hf_config.save_pretrained)
            writer.save(1, lambda actor=actor: RunState({"model": actor.sharded_weights()}, {}), last=True)
            command("export", str(latest_checkpoint(Path(root) / "own")), f"{root}/exported")
            report[family]["weights of the CPU's export"] = same(actor, f"{root}/exported")
            report.expect(report[family]["weights of the CPU's export"], f"{family}: a CPU exports this checkpoint")


def run(report: Report, size: Sizes) -> None:
    """JEPO as a user starts it: warm-up, sampling by the embedded sampler, updates, checkpoint, and on from there."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            *("--config-name", "demo", "trainer.precision=bf16"),
            *(f"exp_manager.exp_dir={folder}", "exp_manager.name=run", "exp_manager.create_tensorboard_logger=false"),
            *(
                f"warmup.max_steps={size.warmup_steps}",
                "trainer.jepo.save_interval=1",
                "trainer.jepo.val_at_start=false",
            ),
            *("trainer.jepo.val_check_interval=0", f"data.arithmetic.num_validation={size.validation}"),
            *(f"trainer.jepo.num_prompts_per_step={size.run_prompts}", "data.arithmetic.num_train=2000"),
        ]
        for steps in (size.run_steps, size.run_steps + 1):
            command = [sys.executable, "-m", "nemo_jepo.cli", "train", *settings, f"trainer.jepo.max_steps={steps}"]
            begin = perf_counter()
            ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            report[f"seconds to step {steps}"] = perf_counter() - begin
            if ended.returncode:
                raise RuntimeError(f"exit code {ended.returncode}\n{(ended.stdout + ended.stderr)[-3000:]}")
        lines = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
    last = lines[-1]
    shown = (
        "step",
        "val_rollouts/proxy_nll",
        "val_rollouts/accuracy",
        "train_optim/surrogate_loss",
        "train_optim/grad_norm",
    )
    more = ("train_rollouts/logprob_difference", "train_rollouts/valid_rate", "timing/step_time", "timing/generate")
    report["last line"] = {name: last[name] for name in (*shown, *more) if name in last}
    report["metrics"] = {name: value for name, value in last.items() if "logprob_diff" in name or "timing" in name}
    report.expect(last["step"] == size.run_steps + 1, "the run goes on from its checkpoint")


def vllm_round_trip(report: Report, size: Sizes) -> None:
    """A vLLM server on the trainer's GPU."""
    if importlib.util.find_spec("vllm") is None:
        raise Skip("vLLM is not installed")
    suite(report, size, ["test_vllm.py"])
