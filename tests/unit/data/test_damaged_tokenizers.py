"""Tokenizer folders that cannot be read: one line that names the folder, and nothing in it is executed."""

import json
from pathlib import Path

import pytest

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import AnswerConfig, DataConfig
from nemo_jepo.data.files import Row
from nemo_jepo.data.prompts import prompts_of_rows
from nemo_jepo.data.tokenizer import load_tokenizer
from tests.support.small_tokenizers import small_tokenizer


@pytest.fixture
def folder(tmp_path) -> Path:
    small_tokenizer("byte_level").save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def fault_of(folder: Path, use_chat_template: bool = False) -> str:
    with pytest.raises(ConfigError) as caught:
        tokenizer = load_tokenizer(folder, use_chat_template)
        config = DataConfig(use_chat_template=use_chat_template)
        list(prompts_of_rows([Row("rows", 1, "a", "b")], config, tokenizer, AnswerConfig()))
    assert str(caught.value).isprintable() and str(folder) in str(caught.value)
    return str(caught.value).replace(str(folder), "FOLDER")


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("content", ["", "[]", "{", "null", "[" * 5000, '{"version": "1.0"}'])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_file_is_one_line(name, content, folder):
    (folder / name).write_text(content)
    if (name, content) != ("tokenizer_config.json", '{"version": "1.0"}'):
        assert fault_of(folder).startswith("tokenizer.path='FOLDER")


def test_a_tokenizer_that_cannot_write_every_word_is_one_line(folder):
    words = {"type": "WordLevel", "vocab": {"<|endoftext|>": 0, "a": 1}, "unk_token": "[UNK]"}
    edit(folder / "tokenizer.json", model=words, normalizer=None, pre_tokenizer={"type": "Whitespace"}, decoder=None)
    rule = (
        "the tokenizer or its chat template fails on a text (WordLevel error: Missing [UNK] token from the vocabulary)"
    )
    assert fault_of(folder).startswith(f"tokenizer.path='FOLDER': {rule}. ")


def test_a_panic_of_rust_is_one_line_and_prints_nothing_beside_it(folder, capfd):
    edit(folder / "tokenizer.json", normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    assert fault_of(folder).startswith("tokenizer.path='FOLDER': transformers refuses its tokenizer (")
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "template", ["{{", "{% for %}", "{{ 1 / 0 }}", "{{ messages[9].x.y }}", "{{ raise_exception('no') }}"]
)
def test_a_chat_template_that_fails_is_one_line(template, folder):
    (folder / "chat_template.jinja").write_text(template)
    rule = "the tokenizer or its chat template fails on a text ("
    assert fault_of(folder, use_chat_template=True).startswith(f"tokenizer.path='FOLDER': {rule}")


def test_code_of_the_folder_and_files_of_other_folders_are_not_read(folder):
    (folder / "evil.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('executed').touch()\nclass Evil: pass\n"
    )
    edit(
        folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, tokenizer_class="Evil"
    )
    try:
        load_tokenizer(folder)
    except ConfigError as error:
        assert str(error).isprintable()
    assert not (folder / "executed").exists()
    edit(folder / "tokenizer_config.json", fast_tokenizer_files=["../tokenizer.4.0.json"])
    rule = "fast_tokenizer_files=['../tokenizer.4.0.json'] must be names of files beside it. Leave it out."
    assert fault_of(folder) == f"tokenizer.path='FOLDER/tokenizer_config.json': {rule}"
