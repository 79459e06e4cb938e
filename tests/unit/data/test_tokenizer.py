"""A trained tokenizer writes any text, digit by digit; a folder that is no tokenizer is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.data.tokenizer import load_tokenizer, train_tokenizer
from tests.support.small_tokenizers import BUILDERS


@given(text=st.text())
def test_a_trained_tokenizer_writes_any_text(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_every_digit_is_a_token_of_its_own(tokenizer):
    assert tokenizer.tokenize("48+42=90") == list("48+42=90")
    assert [token for token in tokenizer.get_vocab() if sum(map(str.isdigit, token)) and len(token) > 1] == []


def test_a_trained_tokenizer_has_padding_an_end_and_at_most_the_size_asked_for(tokenizer):
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<|pad|>", "<|endoftext|>", None)
    assert 258 < len(tokenizer) <= 300


def test_a_loaded_tokenizer_is_the_trained_one_and_leaves_no_other_file(tmp_path):
    trained = train_tokenizer(["the final answer is 42"] * 3, vocab_size=270, folder=tmp_path / "small")
    loaded = load_tokenizer(tmp_path / "small")
    assert loaded.get_vocab() == trained.get_vocab()
    assert loaded.eos_token_id == trained.eos_token_id
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    with pytest.raises(FileExistsError, match="small exists"):
        train_tokenizer(["other"], vocab_size=270, folder=tmp_path / "small")


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(ConfigError, match="tokenizer.path=.*holds no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        load_tokenizer(tmp_path / "absent")


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path):
    endless = BUILDERS["byte_level"]()
    endless.eos_token = None
    endless.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no end-of-text token"):
        load_tokenizer(tmp_path)


CHAT = "{% for turn in messages %}<|start|>{{ turn['content'] }}BEHIND{% endfor %}"


@pytest.mark.parametrize(
    ("behind", "use_chat_template", "end"),
    [
        ("<|end_of_turn|>\n", True, "<|end_of_turn|>"),
        (" <|end_of_turn|><|start|>", True, "<|end_of_turn|>"),
        ("<|end_of_turn|>\n", False, "<|endoftext|>"),  # no prompt is written by the template
        ("<|endoftext|>\n", True, "<|endoftext|>"),
        ("\n\n", True, "<|endoftext|>"),  # the template ends its turns with text
        (". <|end_of_turn|>", True, "<|endoftext|>"),
    ],
)
def test_an_answer_ends_as_turns_do_in_the_chat_template(behind, use_chat_template, end, tmp_path):
    """Models are published whose tokenizer calls another token the end: base models, and files misread on the way."""
    chat = BUILDERS["byte_level"]()
    chat.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end_of_turn|>", "<|end"]})
    chat.chat_template = CHAT.replace("BEHIND", behind)
    chat.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path, use_chat_template).eos_token == end


def test_a_folder_without_a_chat_template_keeps_its_end(tmp_path):
    BUILDERS["byte_level"]().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path, use_chat_template=True).eos_token == "<|endoftext|>"
