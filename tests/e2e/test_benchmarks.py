"""The benchmarks run at toy size and say what they measured; how fast a machine is, no test knows."""

import json
import os
import random
import subprocess
import sys

import pytest
import torch

from benchmarks import convert_memory
from benchmarks.peers import __main__ as peers
from benchmarks.peers.driver import Variant
from tests.support.ranks import ROOT
from tests.support.vllm_processes import needs_vllm


@pytest.mark.nightly
def test_the_step_benchmark_writes_every_figure(tmp_path):
    """In a process of its own: the actor takes the process group and the gloo shim with it."""
    out, data = tmp_path / "step.json", tmp_path / "train.jsonl"
    rng = random.Random(3)
    lines = []
    for _ in range(20):
        a, b = rng.randint(1, 99), rng.randint(1, 99)
        lines.append({"question": f"What is {a} plus {b}?", "answer": f"{a} + {b} = {a + b}.\n#### {a + b}"})
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = "--prompts 2 --generations 2 --tokens-per-row 128 --repetitions 1"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.step", *options.split(), "--data", str(data), "--out", str(out)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    variants = {"shared prompts", "packed", "padded batch", "padded"}
    assert set(report["medians"]) == set(report["rows"]) == set(report["speedup"]) == variants
    assert report["rows"]["padded"] == 4
    assert report["computed_tokens"]["padded"] == 4 * report["longest_sequence"]
    assert report["speedup"]["shared prompts"] == 1.0
    for metrics in report["medians"].values():
        assert metrics["useful_tokens_per_second"] == pytest.approx(report["useful_tokens"] / metrics["seconds"])
    assert all(name in done.stdout for name in variants)


@pytest.mark.nightly
@needs_vllm
@pytest.mark.timeout(600)
def test_the_rollout_benchmark_writes_every_figure(tmp_path):
    out = tmp_path / "rollout.json"
    options = "--num-prompts 2 --max-tokens 24 --width 128 --num-steps 4 --repetitions 1"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.rollout", *options.split(), "--out", str(out)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(out.read_text())
    decoded = {name: metrics["decoded_tokens"] for name, metrics in report["sampling"]["medians"].items()}
    assert set(decoded) == {f"{sampler}, {how}" for sampler in ("embedded", "vllm") for how in ("stop", "whole")}
    assert decoded["vllm, stop"] <= decoded["vllm, whole"] <= 2 * 4 * 24
    assert set(report["sync"]["ratios"]) == {"gloo / copy", "file / copy"}
    assert set(report["hidden"]["medians"]) == {"max_staleness 0", "max_staleness 1"}
    assert all(ratio in done.stdout for part in ("sampling", "sync", "hidden") for ratio in report[part]["ratios"])


@pytest.mark.timeout(900)  # six starts of a process, one after another, on a machine that may be busy
def test_import_and_export_hold_little_more_than_the_share(tmp_path):
    """A model of 200 MB, of which no tensor is over 5 MB: a second copy of the layers' fc1 would show, 58 MB at TP2."""
    size = convert_memory.Size(hidden=512, layers=14, inner=4096, heads=8, kv_heads=4, vocab=2000)
    found = convert_memory.run(size, [1, 2], tmp_path)
    assert not list(tmp_path.iterdir())
    assert set(found["ranks"]) == {"import TP1", "export TP1", "import TP2", "export TP2"}
    for name, ranks in found["ranks"].items():
        assert len(ranks) == int(name[-1])
        for metrics in ranks:
            assert metrics["share"] == pytest.approx(found["model_bytes"] / len(ranks), rel=0.01)
            assert 0 <= metrics["bytes"] - metrics["share"] < 50e6, name
        assert name in convert_memory.show(found)


def test_peers_do_the_same_work_and_trl_may_be_absent(tmp_path):
    size = peers.Size(hidden=64, layers=2, sequences=16, sequences_per_micro_batch=8, chain_tokens=12)
    updates = {"TRL": Variant("update_trl", python=str(tmp_path / "absent"))}
    updates |= {"ours": Variant("update_ours"), "limit": Variant("update_limit", ["shared_prompts"])}
    samplers = {name: Variant("sampling", [name]) for name in ("nemo_jepo", "plain_loop")}
    found = peers.run({"update_5m": updates, "sampling": samplers}, size, threads=1, repetitions=2)
    assert found["left_out"] == ["TRL"]
    assert set(found["update_5m"]["medians"]) == {"ours", "limit"}
    assert set(found["sampling"]["medians"]) == set(samplers)
    assert found["sampling"]["useful_tokens"] == 16 * (12 + 4)
    for part in ("update_5m", "sampling"):
        of_part = found[part]
        assert len(of_part["rounds"]) == 2 and of_part["speedup"][of_part["baseline"]] == 1.0
        for metrics in of_part["rounds"][0].values():
            rate = of_part["useful_tokens"] / metrics["cpu_seconds"]
            assert metrics["useful_tokens_per_cpu_second"] == pytest.approx(rate)
    norms = [metrics["grad_norm"] for metrics in found["update_5m"]["medians"].values()]
    assert norms == pytest.approx([norms[0]] * len(norms), rel=1e-4)
    shown = peers.show(json.loads(json.dumps(found)))
    assert "make peers" in shown and all(name in shown for name in (*samplers, *updates))


def h100_command(*options: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.h100", *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
    )


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_the_h100_benchmark_runs_dry_and_writes_every_figure(tmp_path):
    done = h100_command("--dry-run", "--models", "1b", "--out", str(tmp_path / "h100.json"))
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "h100.json").read_text())
    assert found["dry_run"] and found["machine"]["device"] == "cpu"
    updates = found["updates"]["1b"]
    variants = updates["variants"]
    assert "Transformer Engine" in variants["fp8 tensorwise"]["refused"]
    for name in ("bf16", "fp32"):
        metrics = variants[name]
        assert metrics["update_tokens_per_second"] == pytest.approx(updates["tokens"] / metrics["update_seconds"])
        assert metrics["update_tflops"] == pytest.approx(updates["model_flops"] / metrics["update_seconds"] / 1e12)
        assert metrics["share_of_peak"] == pytest.approx(metrics["update_tflops"] / 989)
        assert metrics["losses"][-1] < metrics["losses"][0]
        assert metrics["peak_bytes"] > 0
    assert variants["bf16"]["agreement"]["fp8_logprob_error"] == 0
    assert 0 < variants["fp32"]["agreement"]["fp8_error_ratio"] < 0.1
    assert set(found["logprobs"]) == {"size", "naive", "chunked", "fused"}
    assert set(found["packing"]["1b"]) == {"shared prompts", "packed", "padded batch", "padded"}
    for word in ("of peak", "fp8 tensorwise", "log-probs, bf16", "packed is faster by"):
        assert word in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_h100_benchmark_refuses_a_machine_without_gpu_in_one_line():
    done = h100_command()
    assert done.returncode == 2 and "--dry-run runs the same code" in done.stderr.splitlines()[-1]
