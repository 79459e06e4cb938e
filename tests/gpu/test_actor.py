"""An actor on one GPU: packed rows equal padded ones, FP8 is used and close to BF16, memory goes where it should."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import logprob_memory
from tests.gpu.marks import needs_hopper, needs_transformer_engine
from tests.support.ranks import run_ranks

RECIPES = ("tensorwise", "blockwise")


def run_case(name: str, folder: Path) -> dict[str, Any]:
    run_ranks(1, ["-m", "tests.gpu.actor_worker", name, str(folder / "out.json")], forked=False)
    return json.loads((folder / "out.json").read_text())


def difference(left: list[float], right: list[float]) -> torch.Tensor:
    return (torch.tensor(left) - torch.tensor(right)).abs()


# ---- packing


def test_packed_rows_give_what_padded_ones_give(tmp_path):
    """Transformer Engine's attention over many segments a row, over shared prompts, and over one segment."""
    found = run_case("packing", tmp_path)
    padded = found["padded"]
    for packed in (found["packed"], found["shared"]):
        assert packed["rows"] < padded["rows"]
        assert difference(packed["logprobs"], padded["logprobs"]).mean() < 0.01
        assert packed["loss"] == pytest.approx(padded["loss"], rel=1e-3)
        assert packed["grad_norm"] == pytest.approx(padded["grad_norm"], rel=0.02)


# ---- FP8


@pytest.fixture(scope="module")
def precision(tmp_path_factory) -> dict[str, Any]:
    return run_case("precision", tmp_path_factory.mktemp("precision"))


@needs_transformer_engine
@needs_hopper
@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_is_used_and_close_to_bf16(recipe, precision):
    error = difference(precision[recipe]["logprobs"], precision["bf16"]["logprobs"]).mean()
    assert 1e-4 < error < 0.6  # e4m3 keeps 4 bits: rounding the inputs of every product alone gives 0.3


@needs_transformer_engine
@needs_hopper
@pytest.mark.parametrize("recipe", RECIPES)
def test_switching_fp8_off_for_a_pass_gives_bf16_and_fp8_again_afterwards(recipe, precision):
    found, bf16 = precision[recipe], precision["bf16"]["logprobs"]
    fp8_error = difference(found["logprobs"], bf16).mean()
    assert difference(found["in_bf16"], bf16).mean() < 0.05 * fp8_error
    assert difference(found["again"], found["logprobs"]).mean() < 0.05 * fp8_error


@needs_transformer_engine
@needs_hopper
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_guard_measures_real_fp8(recipe, precision):
    guard = precision[recipe]["guard"]
    assert 0 < guard["fp8_error_ratio"] < 1
    assert "model.fp8_guard_ratio=0" in precision[recipe]["said"][0]


@needs_transformer_engine
@needs_hopper
@pytest.mark.parametrize("recipe", RECIPES)
def test_an_fp8_recipe_trains_as_bf16_does(recipe, precision):
    losses, expected = precision[recipe]["losses"], precision["bf16"]["losses"]
    assert losses[-1] < losses[0] - 0.1
    assert all(loss == pytest.approx(other, rel=0.1) for loss, other in zip(losses, expected, strict=True))


# ---- memory


@pytest.fixture(scope="module")
def memory(tmp_path_factory) -> dict[str, Any]:
    return run_case("memory", tmp_path_factory.mktemp("memory"))


@pytest.mark.parametrize("place", ["cpu", "gpu"])
def test_the_reference_policy_scores_as_the_initial_weights_did_and_the_own_weights_return(place, memory):
    found = memory[place]
    assert difference(found["reference"], found["initial"]).max() < 1e-3
    assert difference(found["own again"], found["own"]).max() < 1e-3
    assert difference(found["own"], found["initial"]).mean() > 0.01


def test_a_reference_policy_costs_gpu_memory_only_where_it_lives_there(memory):
    assert memory["bytes of a reference on gpu"] >= memory["bytes of the weights"]
    assert memory["bytes of a reference on cpu"] < 0.01 * memory["bytes of the weights"]


@pytest.mark.parametrize("variant", ["chunked", "fused"])
def test_log_probs_in_chunks_take_one_block_and_the_hidden_states_gradient(variant):
    size = logprob_memory.Size()
    found = logprob_memory.in_fresh_process(variant, size)
    hidden_gradient, block = 4 * size.hidden * size.tokens, 4 * size.chunk_tokens * size.vocab
    assert found["bytes_without_gradients"] < block + 64e6
    assert found["bytes_with_gradients"] < hidden_gradient + 2 * block + 64e6  # the logits, and their gradient
    naive = logprob_memory.in_fresh_process("naive", size)
    assert naive["bytes_with_gradients"] > 12 * found["bytes_with_gradients"]
