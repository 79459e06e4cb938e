"""rloo on judgements of pairs: `nemo-jepo data prepare judge_pairs`, `train` and `evaluate`, end to end."""

import json

import pytest

from nemo_jepo.tools.prepare.command import main as prepare
from tests.support.command_line import command, metrics, run
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.quick


def test_pairs_are_judged_together_on_one_replica_and_on_two(tmp_path):
    rows = [{"question": f"What is {n}+{n}?", "answer": f"{2 * n}", "bad": f"{2 * n + 1}"} for n in range(1, 13)]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = ["--out", str(tmp_path), "--held-out", "3"]
    prepare(["prepare", "judge_pairs", "--from", str(file), "--bad-key", "bad", *out])
    made = tmp_path / "judge_pairs"
    overrides = ["objective=rloo", "data=jsonl", f"data.train_path={made / 'train.parquet'}", "data.verifier=judgement"]
    overrides += [f"data.validation_path={made / 'validation.parquet'}", "data.group_key=group"]
    overrides += ["data.num_validation_prompts=5", "trainer.jepo.max_steps=2", "trainer.jepo.num_prompts_per_step=4"]
    overrides += ["data.max_prompt_tokens=400", "data.max_answer_tokens=16", "model.tokens_per_micro_batch=640"]
    run("train", tmp_path / "one", *overrides)
    run_ranks(2, command("train", tmp_path / "two", *overrides, "trainer.devices=2"))
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for name in ("consistent_accuracy", "one_sided_rate", "unread_rate"):
        assert one[-1][f"val_rollouts/{name}"] == pytest.approx(two[-1][f"val_rollouts/{name}"], abs=1e-6)
    assert one[-1]["val_rollouts/unread_rate"] > 0  # a random model writes something, and no judgement
    assert one[0]["train_rollouts/verifier_fault_rate"] == two[0]["train_rollouts/verifier_fault_rate"] > 0
    assert one[0]["train_rollouts/response_tokens_mean"] == two[0]["train_rollouts/response_tokens_mean"]


def test_generated_judgements_are_measured_in_pairs_and_have_no_oracle(tmp_path):
    overrides = ["objective=rloo", "data.arithmetic.answers=judgement", "data.verifier=judgement"]
    overrides += [
        "data.group_key=group",
        "data.max_prompt_tokens=400",
        "data.max_answer_tokens=16",
        "model.tokens_per_micro_batch=640",
    ]
    run("train", tmp_path, *overrides, "model.hf_config.max_position_embeddings=640", "trainer.jepo.max_steps=1")
    (last,) = metrics(tmp_path)
    assert {"val_rollouts/consistent_accuracy", "val_rollouts/one_sided_rate"} <= last.keys()
    assert not [name for name in last if "oracle" in name]
