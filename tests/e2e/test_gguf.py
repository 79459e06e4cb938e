"""A GGUF file is imported, and a run starts from it."""

import json

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.command_line import TINY, metrics, run
from tests.support.gguf_files import write_gguf
from tests.support.ranks import run_ranks
from tests.support.serving import logprobs, tiny_model

SHAPELESS = [setting for setting in TINY if not setting.startswith(("model.hf_config", "tokenizer."))]


@pytest.mark.quick
def test_a_run_trains_what_a_gguf_file_holds(tmp_path):
    tiny_model(tmp_path / "source", "llama", tied=True, seed=5)
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    write_gguf(source, tmp_path / "model.gguf", gguf.GGMLQuantizationType.Q8_0)
    run_ranks(1, ["-m", "nemo_jepo.cli", "import", str(tmp_path / "model.gguf"), str(tmp_path / "checkpoint")])
    assert {path.name for path in tmp_path.iterdir()} == {"source", "model.gguf", "checkpoint"}

    start = ["model.hf_config=null", f"pretrained_checkpoint.restore_from_path={tmp_path}/checkpoint"]
    run("train", tmp_path, *start, "trainer.jepo.max_steps=3")
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]
    held = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    for line in (tmp_path / "run" / "rollouts" / "step_000001.jsonl").read_text().splitlines():
        rollout = json.loads(line)  # scored before the first update
        prompt, scored = (
            rollout["token_ids"][: rollout["prompt_length"]],
            rollout["token_ids"][rollout["prompt_length"] :],
        )
        expected = logprobs(held, tuple(prompt), tuple(scored))
        torch.testing.assert_close(torch.tensor(rollout["policy_logprobs"]), expected, rtol=0, atol=1e-4)
