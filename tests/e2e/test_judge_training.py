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
    for row in (*one, *two):
        assert 0.0 <= row["train_rollouts/verifier_fault_rate"] <= 1.0
    last, other = one[-1], two[-1]
    for name in ("consistent_accuracy", "one_sided_rate", "unread_rate"):
        assert last[f"val_rollouts/{name}"] == pytest.approx(other[f"val_rollouts/{name}"], abs=1e-6)
    for name in ("marker_rate", "verifier_fault_rate", "loss"):
        if (key := f"train_rollouts/{name}") in one[0]:
            assert one[0][key] == pytest.approx(two[0][key], rel=1e-4)
