"""Every layout gives one process's update: loss, gradient norm, log-probs, and every weight's gradient."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.batch import GROUP_SIZE, NUM_PROMPTS, TINY, rule, sequences
from tests.support.ranks import run_ranks

Update = dict[str, torch.Tensor]

WORKER = str(Path(__file__).with_name("update_worker.py"))
SHAPES = {
    "llama": TINY | {"model_type": "llama"},
    "qwen3": TINY | {"model_type": "qwen3", "tie_word_embeddings": True},  # query and key norms
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": True}
EXPERT_SHAPES = {
    "qwen3_moe": TINY | EXPERTS | {"model_type": "qwen3_moe", "moe_intermediate_size": 24, "norm_topk_prob": True},
    "mixtral": TINY | EXPERTS | {"model_type": "mixtral", "tie_word_embeddings": False},
}
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
CP2, EP2, SP = {"context_parallel_size": 2}, {"expert_model_parallel_size": 2}, {"sequence_parallel": True}
VPP2, UNEVEN = {"virtual_pipeline_model_parallel_size": 2}, {"num_layers_in_first_pipeline_stage": 1}
LINEAR = {"lr": 1e6, "eps": 1e6}  # a step moves every weight by its gradient

ONE_PROCESS: dict[str, dict[str, Any]] = {
    "small rows": {"model": {"tokens_per_micro_batch": 32}},
    "one row": {"model": {"tokens_per_micro_batch": 256, "logprob_chunk_tokens": 1000}},
    "one sequence a row": {"padded": True},
    "full recompute": {"model": {"activations_checkpoint_granularity": "full"}},
    "selective recompute": {"model": {"activations_checkpoint_granularity": "selective"}},
    "plain optimizer": {"optim": {"lr": 1.0, "eps": 1.0, "distributed": False}},
}
TWO_PROCESSES: dict[str, dict[str, Any]] = {
    "TP2": {"model": TP2},
    "TP2+SP": {"model": TP2 | SP},
    "PP2": {"model": PP2},
    "PP2, 1 layer and 3": {"model": PP2 | UNEVEN},
    "PP2 in 4 chunks": {"model": PP2 | VPP2},
    "CP2": {"model": CP2},
    "DP2, 3 prompts and 1": {"split": [3, 1]},
    "DP2, 4 prompts and none": {"split": [4, 0]},
}
FOUR_PROCESSES: dict[str, dict[str, Any]] = {
    "TP2xPP2+SP": {"model": TP2 | PP2 | SP},
    "TP2xPP2+SP in 4 chunks": {"model": TP2 | PP2 | SP | VPP2},
    "TP2xDP2": {"model": TP2, "split": [1, 3]},
    "PP2xDP2 in 4 chunks": {"model": PP2 | VPP2, "split": [3, 1]},
    "CP2xTP2+SP": {"model": CP2 | TP2 | SP},
    "CP2xPP2": {"model": CP2 | PP2},
    "CP2xDP2": {"model": CP2, "split": [1, 3]},
    "CP4": {"model": {"context_parallel_size": 4}},
}
WITH_EXPERTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "TP2+SP": {"model": TP2 | SP},
        "PP2": {"model": PP2},
        "EP2 over DP2, 3 prompts and 1": {"model": EP2, "split": [3, 1]},
        "EP2 over DP2, 4 prompts and none": {"model": EP2, "split": [4, 0]},
        "EP2 over CP2": {"model": EP2 | CP2},
        "EP2 over TP2+SP": {"model": EP2 | TP2 | SP},
    },
    4: {
        "EP2xPP2 over DP2": {"model": EP2 | PP2, "split": [1, 3]},
        "EP2xPP2 over DP2 in 4 chunks": {"model": EP2 | PP2 | VPP2, "split": [3, 1]},
        "EP4 over TP2xDP2+SP": {"model": {"expert_model_parallel_size": 4} | TP2 | SP, "split": [2, 2]},
        "EP2 over TP2xDP2+SP": {"model": EP2 | TP2 | SP, "split": [1, 3]},
    },
}


def run_updates(
    folder: Path, world_size: int, jobs: dict[str, dict[str, Any]], environment: Mapping[str, str] | None = None
) -> dict[str, Update]:
    """Each job's update, all in one start of the processes."""
    files = {name: folder / f"{number}.safetensors" for number, name in enumerate(jobs)}
    (folder / "jobs.json").write_text(json.dumps({str(files[name]): _job(**jobs[name]) for name in jobs}))
    run_ranks(world_size, [WORKER, str(folder / "jobs.json")], environment=environment)
    return {name: load_file(file) for name, file in files.items()}


def _job(shape: str = "llama", **changes: Any) -> dict[str, Any]:
    job: dict[str, Any] = {
        "hf_config": (SHAPES | EXPERT_SHAPES)[shape],
        "model": {},
        "optim": {"lr": 1.0, "eps": 1.0},
        "clip": 0.0,
        "split": [NUM_PROMPTS],
        "group_size": GROUP_SIZE,
        "sequences": [dataclasses.asdict(sequence) for sequence in sequences()],
        "rule": rule(),
    } | changes
    return job | {"model": {"tokens_per_micro_batch": 64, "logprob_chunk_tokens": 5} | job["model"]}


def of_shapes(jobs: dict[str, dict[str, Any]], shapes: Iterable[str] = SHAPES) -> dict[str, dict[str, Any]]:
    return {f"{name} {shape}": changes | {"shape": shape} for name, changes in jobs.items() for shape in shapes}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> dict[str, Update]:
    jobs = {shape: {"shape": shape} for shape in SHAPES | EXPERT_SHAPES} | ONE_PROCESS | {"linear": {"optim": LINEAR}}
    return run_updates(tmp_path_factory.mktemp("one"), 1, jobs)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, one_process) -> dict[str, Update]:
    limit = float(one_process["linear"]["grad_norm"]) / 2
    clipped = {"clipped": {"optim": LINEAR, "clip": limit, "model": TP2}}
    return run_updates(tmp_path_factory.mktemp("two"), 2, of_shapes(TWO_PROCESSES) | clipped)


@pytest.fixture(scope="module")
def four_processes(tmp_path_factory) -> dict[str, Update]:
    return run_updates(tmp_path_factory.mktemp("four"), 4, of_shapes(FOUR_PROCESSES))


@pytest.fixture(scope="module")
def with_experts(tmp_path_factory) -> dict[str, Update]:
    folder = tmp_path_factory.mktemp
    jobs = {ranks: of_shapes(layouts, EXPERT_SHAPES) for ranks, layouts in WITH_EXPERTS.items()}
    return {k: v for ranks in jobs for k, v in run_updates(folder(f"experts{ranks}"), ranks, jobs[ranks]).items()}


def assert_same_update(found: Update, expected: Update, relative: float = 2e-5) -> None:
    assert found.keys() == expected.keys()
    assert expected["grad_norm"] > 0.1
    assert max(expected[name].abs().max() for name in expected if name.startswith("moved/")) > 0.01
    for name in expected:
        if found[name].shape != expected[name].shape:
            assert name == "logprobs"  # rank 0 scored only its own share
            continue
        tolerance = relative * max(1.0, float(expected[name].abs().max()))
        torch.testing.assert_close(
            found[name], expected[name], rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", TWO_PROCESSES)
def test_a_layout_of_two_processes_gives_the_update_of_one(layout, shape, two_processes, one_process):
    assert_same_update(two_processes[f"{layout} {shape}"], one_process[shape])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", FOUR_PROCESSES)
def test_a_layout_of_four_processes_gives_the_update_of_one(layout, shape, four_processes, one_process):
    assert_same_update(four_processes[f"{layout} {shape}"], one_process[shape])


@pytest.mark.parametrize("shape", EXPERT_SHAPES)
@pytest.mark.parametrize("layout", [layout for layouts in WITH_EXPERTS.values() for layout in layouts])
def test_a_layout_of_experts_gives_the_update_of_one_process(layout, shape, with_experts, one_process):
    assert_same_update(with_experts[f"{layout} {shape}"], one_process[shape])


@pytest.mark.parametrize("setting", ONE_PROCESS)
def test_micro_batches_and_memory_settings_do_not_change_the_update(setting, one_process):
    assert_same_update(one_process[setting], one_process["llama"])


def test_clipping_scales_the_whole_update_to_the_limit(two_processes, one_process):
    whole, half = one_process["linear"], two_processes["clipped"]
    for name in whole:
        if name.startswith("moved/"):
            torch.testing.assert_close(half[name], whole[name] / 2, rtol=1e-3, atol=1e-5)
