"""The FP8 guard: its arithmetic, its switch, and what it does in every layout and in a whole run."""

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_jepo.actor.fp8_guard import Reading, squared_error, squared_spread
from tests.distributed.batch import GROUP_SIZE, NUM_PROMPTS, TINY
from tests.distributed.fp8_guard_jobs import guarded
from tests.support.command_line import TINY as TINY_RUN
from tests.support.command_line import metrics
from tests.support.rank_pool import on_ranks
from tests.support.ranks import run_ranks

# ---- arithmetic -----------------------------------------------------------------------------------------------

NAN = math.nan


def table(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_the_error_is_summed_over_the_mask_alone():
    fp8, bf16 = table([-1.0, -5.0, NAN], [-2.0, -3.0, -4.0]), table([-1.5, -5.0, -9.0], [-4.0, NAN, -4.0])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert squared_error(fp8, bf16, mask).tolist() == [0.25 + 0.0 + 4.0, 3.0]


def test_the_spread_is_the_pooled_variance_of_groups_with_two_samples_or_more():
    groups = [[-1.0, -2.0, -6.0], [-4.0, -5.0], [-7.0], []]
    padded = table(*(values + [NAN] * (3 - len(values)) for values in groups))
    valid = torch.tensor([[position < len(values) for position in range(3)] for values in groups])
    deviations, freedom = squared_spread(padded, valid).tolist()
    assert freedom == 2 + 1
    assert deviations == pytest.approx(2 * statistics.variance(groups[0]) + statistics.variance(groups[1]))


def test_the_spread_does_not_see_what_a_whole_group_shares():
    values, valid = table([-1.0, -2.0], [-3.0, -7.0]), torch.ones(2, 2, dtype=torch.bool)
    shifted = values + table([100.0], [-5000.0])
    torch.testing.assert_close(squared_spread(shifted, valid), squared_spread(values, valid))


@pytest.mark.parametrize("size", [3, 50])
def test_known_noise_gives_its_own_ratio(size):
    draw = torch.Generator().manual_seed(1)
    exact = 3.0 * torch.randn(2000, size, generator=draw, dtype=torch.float64)
    noisy = exact + 0.6 * torch.randn(2000, size, generator=draw, dtype=torch.float64)
    everywhere = torch.ones(2000, size, dtype=torch.bool)
    error, spread = (
        math.sqrt(total / count)
        for total, count in (squared_error(noisy, exact, everywhere), squared_spread(exact, everywhere))
    )
    assert Reading(error=error, spread=spread).ratio == pytest.approx(0.2, rel=0.05)


def test_no_spread_makes_any_error_too_large():
    assert Reading(error=0.1, spread=0.0).ratio == math.inf
    assert Reading(error=0.0, spread=0.0).ratio == 0.0


# ---- the actor, over stand-in FP8 -----------------------------------------------------------------------------

LLAMA = TINY | {"model_type": "llama"}
EXPERTS = LLAMA | {"model_type": "qwen3_moe", "num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS |= {"moe_intermediate_size": 24, "norm_topk_prob": True}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one process": {}, "experts": {"shape": EXPERTS}},
    2: {
        "DP2, 3 prompts and 1": {"split": [3, 1]},
        "DP2, 4 prompts and none": {"split": [4, 0]},
        "TP2": {"model": {"tensor_model_parallel_size": 2}},
        "PP2 in 4 chunks": {
            "model": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        },
        "CP2": {"model": {"context_parallel_size": 2}},
        "EP2 over DP2, 4 prompts and none": {
            "model": {"expert_model_parallel_size": 2},
            "split": [4, 0],
            "shape": EXPERTS,
        },
    },
}
NAMES = [name for layouts in LAYOUTS.values() for name in layouts]


@pytest.fixture(scope="module")
def found() -> dict[str, list[dict[str, Any]]]:
    """Every layout's facts, a list over its data-parallel replicas."""
    outcomes: dict[str, list[dict[str, Any]]] = {}
    default = {"model": {}, "split": [NUM_PROMPTS], "shape": LLAMA}
    for world_size, layouts in LAYOUTS.items():
        for name, layout in layouts.items():
            of_ranks = on_ranks(world_size, guarded, default | layout)
            assert_ranks_agree(of_ranks)
            outcomes[name] = of_ranks[: len(layout.get("split", [NUM_PROMPTS]))]
    return outcomes


def assert_ranks_agree(of_ranks: list[dict[str, Any]]) -> None:
    for of_rank in of_ranks:
        for key in ("quiet", "guarded", "said"):
            assert of_rank[key] == of_ranks[0][key]


@pytest.mark.parametrize("layout", NAMES)
def test_the_switch_is_exact_and_undone_afterwards(layout, found):
    for replica in found[layout]:
        assert replica["switched off"] == replica["bf16"]
        assert replica["after an exception"] == replica["fp8"]
        if replica["rows"]:
            assert replica["fp8"] != replica["bf16"]


def expected(replicas: list[dict[str, Any]], turn: int) -> Reading:
    """From the definitions, over all replicas' samples."""
    squares, deviations, freedom = [], 0.0, 0
    for replica in replicas:
        chosen = replica["rows"][turn % len(replica["rows"])] if replica["rows"] else []
        squares += [(replica["fp8"][i] - replica["bf16"][i]) ** 2 for i in chosen if replica["valid"][i]]
        for start in range(0, len(replica["fp8"]), GROUP_SIZE):
            group = [replica["fp8"][i] for i in range(start, start + GROUP_SIZE) if replica["valid"][i]]
            if len(group) >= 2:
                deviations += (len(group) - 1) * statistics.variance(group)
                freedom += len(group) - 1
    return Reading(error=math.sqrt(statistics.mean(squares)), spread=math.sqrt(deviations / freedom))


@pytest.mark.parametrize("layout", NAMES)
def test_every_second_step_reports_the_definitions_of_another_row(layout, found):
    replicas = found[layout]
    assert [bool(reading) for reading in replicas[0]["quiet"]] == [True, False, True, False, True]
    for turn, step in enumerate((0, 2, 4)):
        reading = expected(replicas, turn)
        assert replicas[0]["quiet"][step] == pytest.approx(reading.metrics(), rel=1e-6)
        assert 0 < reading.ratio < 1
    assert replicas[0]["quiet"][0] != replicas[0]["quiet"][2]
    assert replicas[0]["said"]["quiet"] == []


@pytest.mark.parametrize("layout", NAMES)
def test_above_the_threshold_scores_are_bf16_from_then_on_and_training_is_not(layout, found):
    for replica in found[layout]:
        assert replica["guarded"] == [replica["quiet"][0], {}, {}, {}, {}]
        assert replica["then"] == replica["bf16"]
        fp8, bf16, then = replica["losses"]
        assert then == fp8 != bf16
        (line,) = replica["said"]["bf16"]
        assert line.startswith("step 1: the FP8 log-probs of answers are off by ")
        assert line.endswith("model.fp8_guard_ratio=0; scoring in BF16 from now on")


@pytest.mark.parametrize("layout", NAMES)
def test_without_fp8_nothing_is_compared(layout, found):
    assert found[layout][0]["without fp8"] == [{}, {}]


# ---- a whole run ----------------------------------------------------------------------------------------------


def train(folder: Path, *overrides: str) -> tuple[list[dict[str, Any]], str]:
    """Metrics and output of a tiny run over stand-in FP8."""
    where = [f"exp_manager.exp_dir={folder}", "exp_manager.name=run"]
    run = ["trainer.jepo.val_check_interval=0", "model.fp8=hybrid", "model.fp8_guard_interval=2"]
    run += ["trainer.precision=bf16", "model.tokens_per_micro_batch=1024"]  # so one row holds every sample
    # The random model goes on writing its marker: a comparison needs a prompt with two valid samples.
    run += ["objective.format_loss=paper", "advantage.prompt_mean=valid"]
    output = run_ranks(1, ["-m", "tests.distributed.fp8_stand_in", "train", *TINY_RUN, *where, *run, *overrides])
    return metrics(folder), output


def test_a_run_reports_the_ratio_and_warns_each_time(tmp_path):
    lines, output = train(tmp_path, "trainer.jepo.max_steps=3", "model.fp8_guard_ratio=0")
    names = ("fp8_logprob_error", "fp8_group_spread", "fp8_error_ratio")
    assert [[f"train_rollouts/{name}" in line for name in names] for line in lines] == [[True] * 3, [False] * 3] + [
        [True] * 3
    ]
    for line in lines[::2]:
        error, spread, ratio = (line[f"train_rollouts/{name}"] for name in names)
        assert 0 < ratio == pytest.approx(error / spread)
    assert output.count("model.fp8_guard_action=bf16 would help") == 2


def test_a_run_that_turned_to_bf16_scores_resumes_with_them(tmp_path):
    turn = ["model.fp8_guard_ratio=0", "model.fp8_guard_action=bf16"]
    train(tmp_path, "trainer.jepo.max_steps=2", *turn)
    lines, output = train(tmp_path, "trainer.jepo.max_steps=4", *turn)
    assert [line["step"] for line in lines if "train_rollouts/fp8_error_ratio" in line] == [1]
    assert "scoring in BF16" not in output
