"""The prompt's token ids: template, chat template, beginning of text; and answers that cannot be written."""

import pytest
from tokenizers.processors import TemplateProcessing

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import AnswerConfig, DataConfig
from nemo_jepo.data.files import BadRow, Row
from nemo_jepo.data.prompts import prompts_of_rows
from nemo_jepo.types import Prompt
from tests.support.small_tokenizers import BUILDERS

CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def only_prompt(question: str, tokenizer, **settings):
    (prompt,) = prompts_of_rows([Row("rows", 1, question, "42")], DataConfig(**settings), tokenizer, AnswerConfig())
    return prompt


def beginning_of_text(tokenizer):
    """The tokenizer, now with a token that it puts before every text, as Llama's do."""
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def test_the_question_is_inserted_as_it_stands():
    tokenizer = BUILDERS["byte_level"]()
    prompt = only_prompt("{x} {question}", tokenizer, prompt_template="{{Q}} {question} =")
    assert tokenizer.decode(list(prompt.token_ids)) == "{{Q}} {x} {question} ="


def test_a_text_begins_with_the_token_that_its_tokenizer_begins_texts_with_once():
    tokenizer = beginning_of_text(BUILDERS["byte_level"]())
    for template in ("{question}", "<s>{question}"):
        prompt = only_prompt("is", tokenizer, prompt_template=template)
        assert tokenizer.decode(list(prompt.token_ids)) == "<s>is"


def test_a_tokenizer_with_a_beginning_of_text_that_it_does_not_use_adds_none():
    tokenizer = BUILDERS["byte_level"]()
    tokenizer.bos_token = tokenizer.eos_token  # as GPT-2's
    prompt = only_prompt("is", tokenizer, prompt_template="{question}")
    assert tokenizer.decode(list(prompt.token_ids)) == "is"


def test_a_chat_template_is_the_whole_prompt():
    tokenizer = beginning_of_text(BUILDERS["byte_level"]())
    tokenizer.chat_template = CHATML
    settings = {"prompt_template": "{question}!", "use_chat_template": True}
    prompt = only_prompt("is", tokenizer, **settings)
    assert tokenizer.decode(list(prompt.token_ids)) == "<user>is!</><assistant>"
    prompt = only_prompt("is", tokenizer, **settings, system_prompt="So")
    assert tokenizer.decode(list(prompt.token_ids)) == "<system>So</><user>is!</><assistant>"


def test_a_chat_template_that_does_not_exist_cannot_be_used():
    with pytest.raises(ConfigError, match="data.use_chat_template=True"):
        only_prompt("is", BUILDERS["byte_level"](), use_chat_template=True)


def test_a_limit_is_the_longest_that_is_allowed_and_an_answer_has_an_end_of_turn():
    tokenizer = BUILDERS["byte_level"]()
    row = Row("rows", 1, "is:", "42")  # 2 tokens; 1 token and the end of turn
    for prompt_limit, answer_limit, allowed in [(2, 2, True), (1, 2, False), (2, 1, False)]:
        config = DataConfig(
            prompt_template="{question}", max_prompt_tokens=prompt_limit, max_answer_tokens=answer_limit
        )
        (item,) = prompts_of_rows([row], config, tokenizer, AnswerConfig())
        assert isinstance(item, Prompt) == allowed


def test_an_answer_that_the_tokenizer_cannot_write_is_a_bad_row():
    rows = [Row("rows", 5, "is", "\u221a2"), Row("rows", 6, "is", "e\u0301")]
    (bad, _) = prompts_of_rows(rows, DataConfig(answer_key="a"), BUILDERS["metaspace_always"](), AnswerConfig())
    assert isinstance(bad, BadRow) and (bad.line, bad.field) == (5, "a")
    assert "cannot write it" in bad.problem
    (prompt, composed) = prompts_of_rows(rows, DataConfig(), BUILDERS["byte_level_nfc"](), AnswerConfig())
    assert (prompt.prompt_id, prompt.answer, composed.answer) == (4, "\u221a2", "e\u0301")
