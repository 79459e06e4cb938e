"""Every layout gives one process's update: loss, gradient norm, log-probs, and every weight's gradient."""

import functools
from typing import Any

import pytest
import torch

from tests.distributed.batch import GROUP_SIZE, NUM_PROMPTS, TINY, rule, sequences, with_no_chain
from tests.distributed.update_jobs import update
from tests.support.rank_pool import on_ranks

Update = dict[str, torch.Tensor]

SHAPES = {
    "llama": TINY | {"model_type": "llama"},
    # Every layout is tried with this one: its norms of queries and keys and its tied head are what layouts cut through.
    "qwen3": TINY | {"model_type": "qwen3", "tie_word_embeddings": True},
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

# What everything else must equal: a sequence a row with its own prompt, scored in one pass and trained in another.
PLAIN: dict[str, Any] = {"padded": True, "model": {"update_passes": "two"}}
ONE_PROCESS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "two passes": {"model": {"update_passes": "two"}},
    "one pass": {"model": {"update_passes": "one"}},
    "prompts of their own": {"model": {"share_prompts": False}},
    "prompts of their own, two passes": {"model": {"share_prompts": False, "update_passes": "two"}},
    "two passes, full recompute": {"model": {"update_passes": "two", "activations_checkpoint_granularity": "full"}},
    "small rows": {"model": {"tokens_per_micro_batch": 32}},
    "one row": {"model": {"tokens_per_micro_batch": 256, "logprob_chunk_tokens": 1000}},
    "full recompute": {"model": {"activations_checkpoint_granularity": "full"}},
    "selective recompute": {"model": {"activations_checkpoint_granularity": "selective"}},
    "plain optimizer": {"optim": {"lr": 1.0, "eps": 1.0, "distributed": False}},
    "linear": {"optim": LINEAR},
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
EXPERTS_ON_TWO: dict[str, dict[str, Any]] = {
    "TP2+SP": {"model": TP2 | SP},
    "PP2": {"model": PP2},
    "EP2 over DP2, 3 prompts and 1": {"model": EP2, "split": [3, 1]},
    "EP2 over DP2, 4 prompts and none": {"model": EP2, "split": [4, 0]},
    "EP2 over CP2": {"model": EP2 | CP2},
    "EP2 over TP2+SP": {"model": EP2 | TP2 | SP},
}
EXPERTS_ON_FOUR: dict[str, dict[str, Any]] = {
    "EP2xPP2 over DP2": {"model": EP2 | PP2, "split": [1, 3]},
    "EP2xPP2 over DP2 in 4 chunks": {"model": EP2 | PP2 | VPP2, "split": [3, 1]},
    "EP4 over TP2xDP2+SP": {"model": {"expert_model_parallel_size": 4} | TP2 | SP, "split": [2, 2]},
    "EP2 over TP2xDP2+SP": {"model": EP2 | TP2 | SP, "split": [1, 3]},
}


def job_of(shape: str = "llama", **changes: Any) -> dict[str, Any]:
    job: dict[str, Any] = {
        "hf_config": (SHAPES | EXPERT_SHAPES)[shape],
        "model": {},
        "optim": {"lr": 1.0, "eps": 1.0},
        "clip": 0.0,
        "split": [NUM_PROMPTS],
        "group_size": GROUP_SIZE,
        "sequences": sequences(),
        "rule": rule(),
    } | changes
    return job | {"model": {"tokens_per_micro_batch": 64, "logprob_chunk_tokens": 5} | job["model"]}


def updated(world_size: int, **job: Any) -> Update:
    return on_ranks(world_size, update, job_of(**job))[0]


@functools.cache
def one_process(shape: str, setting: str = "") -> Update:
    return updated(1, shape=shape, **(ONE_PROCESS[setting] if setting else PLAIN))


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
def test_a_layout_of_two_processes_gives_the_update_of_one(layout, shape):
    assert_same_update(updated(2, shape=shape, **TWO_PROCESSES[layout]), one_process(shape))


@pytest.mark.parametrize("layout", FOUR_PROCESSES)
def test_a_layout_of_four_processes_gives_the_update_of_one(layout):
    assert_same_update(updated(4, shape="qwen3", **FOUR_PROCESSES[layout]), one_process("qwen3"))


def by_token(**changes: Any) -> dict[str, Any]:
    """A job whose objective reads answers token by token, and behind no chain as well: one segment more a prompt."""
    shared, no_chain = with_no_chain(sequences())
    return {"sequences": shared, "no_chain": no_chain, "rule": rule(name="nrt", no_chain="current")} | changes


BY_TOKEN: dict[str, tuple[int, dict[str, Any]]] = {
    "defaults": (1, {}),
    "small rows": (1, ONE_PROCESS["small rows"]),
    "prompts of their own, two passes": (1, ONE_PROCESS["prompts of their own, two passes"]),
    **{name: (2, TWO_PROCESSES[name]) for name in ("TP2+SP", "PP2", "CP2", "DP2, 3 prompts and 1")},
    "DP2, 4 prompts and none": (2, TWO_PROCESSES["DP2, 4 prompts and none"]),
}


@pytest.mark.parametrize("layout", BY_TOKEN)
def test_an_objective_that_reads_tokens_and_no_chain_has_the_same_update_everywhere(layout):
    world_size, changes = BY_TOKEN[layout]
    plain = updated(1, shape="llama", **by_token(**PLAIN))
    assert_same_update(updated(world_size, shape="llama", **by_token(**changes)), plain)


@pytest.mark.parametrize("shape", EXPERT_SHAPES)
@pytest.mark.parametrize("layout", EXPERTS_ON_TWO)
def test_a_layout_of_experts_on_two_processes_gives_the_update_of_one(layout, shape):
    assert_same_update(updated(2, shape=shape, **EXPERTS_ON_TWO[layout]), one_process(shape))


@pytest.mark.parametrize("layout", EXPERTS_ON_FOUR)
def test_a_layout_of_experts_on_four_processes_gives_the_update_of_one(layout):
    assert_same_update(updated(4, shape="qwen3_moe", **EXPERTS_ON_FOUR[layout]), one_process("qwen3_moe"))


@pytest.mark.parametrize("setting", [setting for setting in ONE_PROCESS if setting != "linear"])
def test_micro_batches_and_memory_settings_do_not_change_the_update(setting):
    assert_same_update(one_process("llama", setting), one_process("llama"))


def test_clipping_scales_the_whole_update_to_the_limit():
    whole = one_process("llama", "linear")
    half = updated(2, optim=LINEAR, clip=float(whole["grad_norm"]) / 2, model=TP2)
    for name in whole:
        if name.startswith("moved/"):
            torch.testing.assert_close(half[name], whole[name] / 2, rtol=1e-3, atol=1e-5)
