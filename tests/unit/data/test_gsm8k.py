"""GSM8K: small rows in its format, and the real files where they lie beside the checkout."""

import json
import re
from pathlib import Path

import pytest

from nemo_jepo.config.errors import DataError
from nemo_jepo.config.schema import AnswerConfig, DataConfig
from nemo_jepo.data.dataset import load_prompts

REAL = Path(__file__).parents[4] / "shared" / "data" / "gsm8k"
SOLUTION = "He sold 48/2 = <<48/2=24>>24 clips.\nTogether $<<24*50=1200>>1,200.\n#### 1,200"


def gsm8k(path: Path, *answers: str) -> DataConfig:
    path.write_text("".join(json.dumps({"question": "How many?", "answer": answer}) + "\n" for answer in answers))
    return DataConfig(name="gsm8k", train_path=str(path), prompt_key="ignored")


def test_the_solution_is_the_chain_of_thought_and_the_number_after_it_the_answer(tmp_path, tokenizer):
    config = gsm8k(tmp_path / "train.jsonl", SOLUTION, "#### -5")
    first, second = load_prompts(config, "train", tokenizer, AnswerConfig()).prompts
    assert (first.question, first.answer) == ("How many?", "1200")
    assert first.chain_of_thought == "He sold 48/2 = 24 clips.\nTogether $1,200."
    assert (second.answer, second.chain_of_thought) == ("-5", None)


@pytest.mark.parametrize(
    "answer, problem", [("24 clips", "has no '#### final answer'"), ("24 ####", "nothing follows")]
)
def test_a_solution_without_final_answer_is_a_bad_row(tmp_path, tokenizer, answer, problem):
    path = tmp_path / "train.jsonl"
    config = gsm8k(path, SOLUTION, answer)
    with pytest.raises(DataError, match=f"{re.escape(str(path))}:2: field 'answer': {problem}"):
        load_prompts(config, "train", tokenizer, AnswerConfig())


@pytest.mark.skipif(not REAL.is_dir(), reason="the GSM8K files are not beside the checkout")
def test_every_row_of_the_real_files_loads(tokenizer):
    config = DataConfig(
        name="gsm8k",
        train_path=str(REAL / "train.jsonl"),
        validation_path=str(REAL / "test.jsonl"),
        num_validation_prompts=10_000,
    )
    train, test = (
        load_prompts(config, "train", tokenizer, AnswerConfig()).prompts,
        load_prompts(config, "validation", tokenizer, AnswerConfig()).prompts,
    )
    assert (len(train), len(test)) == (7473, 1319)
    for prompt in (*train, *test):
        assert re.fullmatch(r"-?\d+(\.\d+)?", prompt.answer), prompt
        assert prompt.chain_of_thought and "<<" not in prompt.chain_of_thought and "####" not in prompt.chain_of_thought
