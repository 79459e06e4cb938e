"""Solved examples in front of every question: as turns of a chat, as plain text, within the prompt's limit."""

import json

import pytest

from nemo_jepo.config.check import check_fields
from nemo_jepo.config.conf_files import shipped_examples
from nemo_jepo.config.errors import ConfigError, DataError
from nemo_jepo.config.schema import AnswerConfig, DataConfig
from nemo_jepo.data.examples import solved_examples
from nemo_jepo.data.files import Row
from nemo_jepo.data.prompts import prompts_of_rows
from nemo_jepo.data.splice import Splicer
from nemo_jepo.types import Prompt
from tests.support.small_tokenizers import BUILDERS

CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROWS = [
    {"question": "2 + 2", "chain_of_thought": "2 + 2 = 4", "answer": 4},
    {"question": "1", "chain_of_thought": None, "answer": "1"},
]


def examples_file(tmp_path, *rows):
    path = tmp_path / "examples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def only_prompt(tokenizer, **settings):
    rows = [Row("rows", 1, "3 + 4", "7")]
    (prompt,) = prompts_of_rows(rows, DataConfig(prompt_template="Q: {question}\n", **settings), tokenizer, ANSWER)
    return prompt


ANSWER = AnswerConfig(marker="the answer is")


def test_examples_are_turns_of_the_chat_behind_the_system_turn(tmp_path):
    tokenizer = BUILDERS["byte_level"]()
    tokenizer.chat_template = CHATML
    path = examples_file(tmp_path, *ROWS)
    prompt = only_prompt(tokenizer, examples=path, use_chat_template=True, system_prompt="So")
    assert tokenizer.decode(list(prompt.token_ids)) == (
        "<system>So</>"
        "<user>Q: 2 + 2\n</><assistant>2 + 2 = 4\nThe answer is 4</>"
        "<user>Q: 1\n</><assistant>The answer is 1</>"
        "<user>Q: 3 + 4\n</><assistant>"
    )


def test_examples_are_plain_text_in_front_of_a_plain_prompt(tmp_path):
    tokenizer = BUILDERS["byte_level"]()
    prompt = only_prompt(tokenizer, examples=examples_file(tmp_path, *ROWS))
    assert tokenizer.decode(list(prompt.token_ids)) == (
        "Q: 2 + 2\n2 + 2 = 4\nThe answer is 4\n\nQ: 1\nThe answer is 1\n\nQ: 3 + 4\n"
    )


def test_a_completion_is_written_as_a_supervised_target_is(tmp_path):
    tokenizer = BUILDERS["byte_level"]()
    splicer = Splicer(tokenizer, AnswerConfig(append_eos=False))
    examples = solved_examples(tmp_path / examples_file(tmp_path, *ROWS), AnswerConfig())
    prompts = [
        Prompt(i, (0,), row["question"], str(row["answer"]), row["chain_of_thought"]) for i, row in enumerate(ROWS)
    ]
    for example, target in zip(examples, splicer.supervised(prompts, "chain_of_thought"), strict=True):
        assert tokenizer.decode(list(target.token_ids[1:])) == example.completion


def test_examples_count_in_the_prompts_limit(tmp_path):
    tokenizer, path = BUILDERS["byte_level"](), examples_file(tmp_path, *ROWS)
    length = len(only_prompt(tokenizer, examples=path).token_ids)
    assert isinstance(only_prompt(tokenizer, examples=path, max_prompt_tokens=length), Prompt)
    too_long = only_prompt(tokenizer, examples=path, max_prompt_tokens=length - 1)
    assert f"{length} prompt tokens" in too_long.problem


def test_examples_that_leave_no_room_are_refused_in_one_line(tmp_path):
    path = examples_file(tmp_path, *ROWS)
    with pytest.raises(ConfigError, match=r"data.examples=.*: 2 examples take \d+ of data.max_prompt_tokens=9 tokens"):
        only_prompt(BUILDERS["byte_level"](), examples=path, max_prompt_tokens=9)


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([ROWS[0], {"question": "2", "answer": "2"}], r"data.examples: .*jsonl:2: field 'chain_of_thought': missing"),
        ([{"question": " ", "chain_of_thought": "x", "answer": "2"}], r"jsonl:1: field 'question': empty"),
        ([], r"holds no example"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, rows, line):
    with pytest.raises(DataError, match=line):
        only_prompt(BUILDERS["byte_level"](), examples=examples_file(tmp_path, *rows))


def test_a_file_that_is_neither_there_nor_shipped_breaks_the_rule_of_its_setting():
    check_fields(DataConfig(examples="gsm8k"), "data.")
    with pytest.raises(ConfigError, match=r"data.examples='gsm9k': must be a .jsonl .* one of .*gsm8k"):
        check_fields(DataConfig(examples="gsm9k"), "data.")


def test_every_shipped_file_is_usable():
    assert {"gsm8k", "chain_sum", "letter_counting", "proofs"} <= set(shipped_examples())
    for path in shipped_examples().values():
        assert len(solved_examples(path, AnswerConfig())) >= 2
