"""A run's settings, marker, data and arithmetic."""

import pytest

from nemo_jepo.config import compose
from nemo_jepo.config.schema import AnswerConfig, Config
from nemo_jepo.data.dataset import load_prompts
from nemo_jepo.data.splice import Splicer
from nemo_jepo.data.tokenizer import train_tokenizer
from nemo_jepo.tools.doctor.findings import BLOCKER, OK, WARNING
from nemo_jepo.tools.doctor.run import batch_arithmetic, check_data, check_marker, check_settings, count_parameters
from nemo_jepo.tools.doctor.run import find_tokenizer as tokenizer_of
from nemo_jepo.types import Prompt

SMALL = ["data.arithmetic.num_train=80", "tokenizer.train_vocab_size=270"]


def config(*overrides: str) -> Config:
    return compose.resolve(compose.compose("demo", [*SMALL, *overrides]))


def test_a_broken_rule_is_a_blocker_with_what_to_do():
    (finding,) = check_settings(config("model.tensor_model_parallel_size=4", "trainer.devices=4"), 4)
    assert finding.level == BLOCKER and finding.fix == "Use a divisor"
    assert finding.text == "model.tensor_model_parallel_size=4: must divide num_key_value_heads=2"
    assert [finding.level for finding in check_settings(config(), 1)] == [OK]


def test_parameters_are_counted_and_a_folder_that_is_no_model_blocks(tmp_path):
    shape = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 100}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": "true"}
    count, (finding,) = count_parameters(config(*(f"model.hf_config.{key}={value}" for key, value in shape.items())))
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12 + 2 * 8
    assert count == 100 * 8 + 2 * layer + 8 and finding.level == OK
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    wrong = config("model.hf_config=null", f"pretrained_checkpoint.restore_from_path={tmp_path}")
    assert [finding.level for finding in count_parameters(wrong)[1]] == [BLOCKER]


@pytest.mark.parametrize(
    ("marker", "answer", "split"),
    [
        ("the answer is", "4", None),
        ("the answer:", "4", "2 of 2 answers after ': '"),
        ("the answer:", "(4)", "after ''"),
    ],
)
def test_a_marker_that_ends_inside_a_token_is_said(marker, answer, split, tmp_path):
    """The tokenizer has tokens of several signs: a marker that ends in ":" cannot be cut off before another one."""
    tokenizer = train_tokenizer(["So the answer is 4 the answer:: the answer:("] * 9, 300, tmp_path / "words")
    prompts = [Prompt(number, (1,), "2+2?", answer) for number in range(2)]
    finding = check_marker(Splicer(tokenizer, AnswerConfig(marker=marker)), tokenizer, marker, prompts)
    assert finding.level == (OK if split is None else WARNING)
    assert (split or "before every one of 2 reference answers") in finding.text


def test_bad_rows_are_counted_and_the_first_is_named(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text('{"question": "1+1?", "answer": "2"}\n{"question": "2+2?"}\n' * 20)
    overrides = ("data=jsonl", f"data.train_path={file}", "data.prompt_key=question", "data.answer_key=answer")
    wrong = list(check_data(config(*overrides), 1))
    assert [finding.subject for finding in wrong if finding.level == BLOCKER] == ["data"]
    skipping = list(check_data(config(*overrides, "data.on_bad_row=skip"), 1))
    (rows,) = [finding for finding in skipping if finding.subject == "training data"]
    assert rows.level == WARNING and f"20 usable rows, 20 skipped, the first: {file}:2" in rows.text


def test_the_arithmetic_of_a_step():
    """32 prompts x 8 samples on 2 replicas: 128 sequences of at most 6 + 48 + 6 tokens each fill 8 rows of 1,024."""
    settings = config("data.arithmetic.num_train=100", "rollout.max_tokens=48", "data.max_answer_tokens=6")
    prompts = load_prompts(settings.data, "train", tokenizer_of(settings), settings.answer).prompts
    (finding,) = batch_arithmetic(settings, prompts, world_size=2)
    assert finding.text.startswith("32 prompts x 8 samples = 256 sequences -> 128 for each of 2 replicas")
    mean = sum(len(prompt.token_ids) for prompt in prompts) / len(prompts)
    rows = -int(-128 * (mean + 54) // settings.model.tokens_per_micro_batch)
    assert f"{rows} rows of {settings.model.tokens_per_micro_batch} = {rows} micro-batches -> 3 steps" in finding.text


def test_too_few_prompts_and_too_many_stages_are_said():
    step = ["trainer.jepo.num_prompts_per_step=24", "trainer.jepo.num_generations_per_prompt=2"]
    few = config("data.arithmetic.num_train=20", "model.pipeline_model_parallel_size=4", *step)
    prompts = load_prompts(few.data, "train", tokenizer_of(few), few.answer).prompts
    _, data, stages = batch_arithmetic(few, prompts, world_size=4)
    assert (data.level, data.text) == (BLOCKER, "20 training prompts do not fill one step")
    assert stages.level == WARNING and "4 pipeline stages" in stages.text
