"""A warm-up and the run after it read their prompts once."""

import json

import pytest

from nemo_jepo.config.errors import DataError
from nemo_jepo.config.schema import AnswerConfig, DataConfig
from nemo_jepo.data.dataset import PromptSplits, has_split
from tests.support.small_tokenizers import BUILDERS


def test_a_file_is_read_once_for_warm_up_and_training(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"question": f"{n}+{n}", "answer": str(2 * n)}) + "\n" for n in range(4)))
    config, splits, tokenizer = DataConfig(train_path=str(file)), PromptSplits(), BUILDERS["byte_level"]()
    warmup = splits.get(config, "warmup", tokenizer, AnswerConfig())
    file.unlink()
    assert splits.get(config, "train", tokenizer, AnswerConfig()) is warmup
    assert [prompt.answer for prompt in warmup] == ["0", "2", "4", "6"]
    assert not has_split(config, "validation")


def test_generated_problems_have_other_rows_for_the_warm_up():
    config, splits, tokenizer = DataConfig(name="arithmetic"), PromptSplits(), BUILDERS["byte_level"]()
    config.arithmetic.num_train = config.arithmetic.num_validation = 4
    warmup, train = (splits.get(config, split, tokenizer, AnswerConfig()) for split in ("warmup", "train"))
    assert [prompt.chain_of_thought for prompt in warmup] != [prompt.chain_of_thought for prompt in train]
    assert has_split(config, "validation")


def test_an_evaluation_reads_the_validation_file_alone(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"question": "1+1", "answer": "2"}) + "\n")
    config, splits = DataConfig(validation_path=str(file)), PromptSplits(trains=False)
    tokenizer = BUILDERS["byte_level"]()
    assert [splits.get(config, split, tokenizer, AnswerConfig()) for split in ("train", "warmup")] == [(), ()]
    assert len(splits.get(config, "validation", tokenizer, AnswerConfig())) == 1


def test_a_stage_with_other_rows_reads_them_and_one_with_another_order_reads_none(tmp_path):
    files = [tmp_path / "easy.jsonl", tmp_path / "hard.jsonl"]
    for file in files:
        file.write_text(json.dumps({"question": "1+1", "answer": file.stem, "topic": file.stem}) + "\n")
    splits, tokenizer = PromptSplits(), BUILDERS["byte_level"]()
    easy, hard = (DataConfig(train_path=str(file), cluster_key="topic") for file in files)
    (first,) = splits.get(easy, "warmup", tokenizer, AnswerConfig())
    assert (first.answer, first.cluster) == ("easy", "easy")
    files[0].unlink()
    easy.sampler = "learning_progress"
    assert splits.get(easy, "train", tokenizer, AnswerConfig()) == (first,)
    (second,) = splits.get(hard, "train", tokenizer, AnswerConfig())
    assert (second.answer, second.cluster) == ("hard", "hard")


def test_a_row_without_its_cluster_is_a_bad_row(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"question": "1+1", "answer": "2"}) + "\n")
    config = DataConfig(train_path=str(file), validation_path=str(file), cluster_key="topic")
    splits, tokenizer = PromptSplits(), BUILDERS["byte_level"]()
    with pytest.raises(DataError, match="rows.jsonl:1: field 'topic': missing"):
        splits.get(config, "train", tokenizer, AnswerConfig())
    assert len(splits.get(config, "validation", tokenizer, AnswerConfig())) == 1
