"""Whole runs through the command line: every objective, every data set, several processes, and wrong settings."""

import json
import math
from pathlib import Path

import pytest

from tests.support.command_line import ENVIRONMENT, command, metrics, run
from tests.support.ranks import run_ranks

SHORT = ["trainer.jepo.max_steps=2", "trainer.jepo.save_interval=0", "trainer.jepo.val_check_interval=0"]


def run_short(folder: Path, *overrides: str) -> list[dict]:
    run("train", folder, *SHORT, *overrides)
    return metrics(folder)


OTHERS = ["jepo_single", "rloo", "jepo_rl", "verifree", "avg_logprob", "gm", "rlpr", "r3", "nrt", "vr_cli"]


@pytest.mark.parametrize("objective", [*OTHERS, "sft_sampled_chain"])
def test_every_objective_trains(objective, tmp_path):
    # "e" is the marker: a random model writes it by chance, and rloo has the paper's format loss to learn from where no
    # answer is right.
    form = "objective.format_loss=paper"
    lines = run_short(tmp_path, f"objective={objective}", form, "evaluation.num_generations_per_prompt=2")
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["train_optim/grad_norm"] > 0
    assert ("train_rollouts/reward" in lines[0]) == (objective in ("rloo", "jepo_rl"))
    assert "val_rollouts/accuracy" in lines[1]


REFILL = ["refill.max_batches=3", "refill.ratio=1.0", "refill.statistics_from=1", "refill.first_step=2"]


def test_prompts_whose_samples_are_alike_are_replaced_by_the_same_ones_in_every_layout(tmp_path):
    """Step 1 drops nothing. Later a step takes prompts of several batches, and two replicas those that one takes."""
    more = [*REFILL, "trainer.jepo.max_steps=4"]
    lines = run_short(tmp_path / "one", *more)
    assert lines[0]["train_rollouts/filtered_rate"] == 0
    assert any(line["train_rollouts/refill_rounds"] > 0 for line in lines[1:])
    assert any(line["train_rollouts/filtered_rate"] > 0 for line in lines[1:])
    run_ranks(2, command("train", tmp_path / "two", *SHORT, *more, "trainer.devices=2"))
    for line, expected in zip(metrics(tmp_path / "two"), lines, strict=True):
        for name in expected:
            assert line[name] == pytest.approx(expected[name], rel=2e-3, abs=2e-5), name


@pytest.mark.parametrize(("passes", "words"), [("auto", "one forward pass of"), ("two", "two forward passes of")])
def test_a_run_says_how_many_passes_an_update_makes(passes, words, tmp_path):
    done = run("train", tmp_path, *SHORT, f"model.update_passes={passes}")
    assert done.stderr.count(f"an update makes {words} the policy (model.update_passes={passes})") == 1


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> list[dict]:
    return run_short(tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize(
    "layout",
    [
        [],  # data parallel: half of the prompts each
        ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true"],
        ["model.pipeline_model_parallel_size=2"],
    ],
    ids=["DP2", "TP2+SP", "PP2"],
)
def test_a_run_of_two_processes_reports_what_one_process_reports(layout, one_process, tmp_path):
    """Sampling depends on seed, step, prompt and sample alone, so even the rollouts are the same."""
    run_ranks(2, command("train", tmp_path, *SHORT, "trainer.devices=2", *layout))
    found = metrics(tmp_path)
    assert len(found) == len(one_process) == 2
    for line, expected in zip(found, one_process, strict=True):
        assert line.keys() == expected.keys()
        for name in expected:
            assert line[name] == pytest.approx(expected[name], rel=2e-3, abs=2e-5), name


def test_a_warm_up_runs_first_and_the_main_run_starts_from_its_weights(tmp_path):
    warm = ["warmup.max_steps=6", "warmup.num_prompts_per_step=16", "warmup.lr=5e-3", "warmup.sched.warmup_steps=0"]
    main = ["trainer.jepo.val_at_start=true", "model.optim.sched.warmup_steps=4"]
    lines = run_short(tmp_path, *warm, *main)
    warmup = [json.loads(line) for line in (tmp_path / "run" / "warmup" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in warmup] == [1, 2, 3, 4, 5, 6]
    assert warmup[5]["train_optim/surrogate_loss"] < warmup[0]["train_optim/surrogate_loss"] - 0.5
    for done, line in enumerate(warmup):  # cosine from 5e-3 to 0 over 6 steps
        assert line["train_optim/lr"] == pytest.approx(5e-3 * (1 + math.cos(math.pi * done / 6)) / 2)
    assert [line["train_optim/lr"] for line in lines[1:]] == pytest.approx([0.0, 1e-3 / 4])  # linear over 4 steps
    assert lines[0]["step"] == 0
    assert lines[0]["val_rollouts/proxy_nll"] == pytest.approx(warmup[5]["val_rollouts/proxy_nll"], rel=1e-6)


@pytest.mark.quick
def test_questions_and_answers_of_a_jsonl_file_train_with_few_rollouts_written(tmp_path):
    rows = [{"problem": f"{n} plus {n}", "proof": f"it is {2 * n}"} for n in range(8)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = ["data.prompt_key=problem", "data.answer_key=proof"]
    lengths = ["data.max_answer_tokens=30", "data.max_prompt_tokens=30"]
    template = 'data.prompt_template="Q: {question} A:"'
    lines = run_short(
        tmp_path, "data=jsonl", f"data.train_path={file}", f"data.validation_path={file}", *keys, *lengths, template
    )
    assert lines[1]["val_rollouts/proxy_nll"] > 0
    rollouts = [json.loads(line) for line in (tmp_path / "run/rollouts/step_000001.jsonl").read_text().splitlines()]
    assert len(rollouts) == 4
    for rollout in rollouts:
        scored = rollout["chain_length"] + rollout["answer_length"]
        assert len(rollout["policy_logprobs"]) == scored == len(rollout["tokens"]) - rollout["prompt_length"]
        assert len(rollout["generation_logprobs"]) == rollout["chain_length"]
        assert rollout["valid"] == (rollout["answer_length"] > 0)
        assert {"advantage", "policy_weight", "answer_weight"} <= rollout.keys()
    valid = next(rollout for rollout in rollouts if rollout["valid"])
    assert valid["answer"] == f" {valid['reference_answer']}<|endoftext|>"
    assert valid["chain_of_thought"].lower().endswith("e")


def test_a_run_ends_after_its_epochs_with_a_validation_and_a_checkpoint(tmp_path):
    epoch = ["data.arithmetic.num_train=8", "trainer.jepo.max_epochs=1", "trainer.jepo.max_steps=50"]
    lines = run_short(tmp_path, *SHORT[1:], *epoch)
    assert [line["step"] for line in lines] == [1, 2]  # 8 rows, 4 prompts a step
    assert "val_rollouts/accuracy" in lines[1]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_000002"


@pytest.mark.quick
def test_a_batch_without_a_valid_sample_is_a_step_with_a_warning(tmp_path):
    done = run("train", tmp_path, *SHORT, "answer.marker=never written")
    for step in (1, 2):
        assert f"step {step}: no completion has the answer marker, so nothing but" in done.stderr
    lines = metrics(tmp_path)
    assert [line["train_rollouts/valid_rate"] for line in lines] == [0, 0]
    assert "train_rollouts/bound" not in lines[0]  # nothing to average


@pytest.mark.quick
def test_a_bad_row_can_be_skipped_and_stops_the_run_otherwise(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "1+1", "answer": "2"}\n{"question": "2+2"}\n')
    data = ["data=jsonl", f"data.train_path={file}", "data.max_answer_tokens=30", "data.max_prompt_tokens=30"]
    line = run("train", tmp_path, *data, expect=2).stderr.strip().splitlines()[-1]
    assert "rows.jsonl:2" in line and "answer" in line
    assert "skip" in line


WRONG = {
    "a typo": (["trainer.jepo.max_stepz=3"], ["trainer.jepo.max_stepz", "trainer.jepo.max_steps"]),
    "heads that TP does not divide": (
        ["model.tensor_model_parallel_size=3", "trainer.devices=3"],
        ["model.tensor_model_parallel_size=3", "num_attention_heads=4"],
    ),
    "a batch that does not divide": (
        ["trainer.devices=3", "trainer.jepo.num_prompts_per_step=4"],
        ["trainer.jepo.num_prompts_per_step=4", "multiple of the 3"],
    ),
    "a missing file": (["data.train_path=/nowhere/rows.jsonl"], ["data.train_path='/nowhere/rows.jsonl'", "exists"]),
    "a missing model": (["pretrained_checkpoint.restore_from_path=/nowhere"], ["restore_from_path='/nowhere'"]),
}


@pytest.mark.quick
@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_setting_is_one_line_and_exit_code_2(mistake, tmp_path, monkeypatch):
    overrides, words = WRONG[mistake]
    if "trainer.devices=3" in overrides:
        monkeypatch.setitem(ENVIRONMENT, "WORLD_SIZE", "3")
    done = run("train", tmp_path, *overrides, expect=2)
    (line,) = done.stderr.strip().splitlines()
    assert all(word in line for word in words), line
    assert done.stdout == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.quick
def test_a_wrong_setting_of_a_judge_ends_an_evaluation_with_one_line(tmp_path):
    line = run("evaluate", tmp_path, "evaluation.judge.votes=2", expect=2).stderr
    assert line.startswith("evaluation.judge.votes=2: must be odd, because an even number can tie.")
    assert line.count("\n") == 1 and "no such key" not in line


@pytest.mark.quick
def test_a_tokenizer_without_end_of_text_is_refused_before_a_model_is_built(tmp_path):
    from transformers import AutoTokenizer

    from nemo_jepo.data.tokenizer import train_tokenizer

    train_tokenizer(["1+1=2"], 270, tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    line = run("train", tmp_path, f"tokenizer.path={tmp_path / 'endless'}", expect=2).stderr.strip().splitlines()[-1]
    assert "tokenizer.path" in line and "end-of-text" in line
