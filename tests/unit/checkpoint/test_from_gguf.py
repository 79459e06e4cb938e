"""A GGUF file becomes a Hugging Face folder with the same numbers and tokens, or one line says why it cannot."""

import sys

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_jepo.checkpoint.hf.from_gguf import open_gguf, tokenizer_of, write_hf_folder
from nemo_jepo.config.errors import ConfigError
from nemo_jepo.data.tokenizer import load_tokenizer
from tests.support.gguf_files import CHAT_TEMPLATE, write_gguf
from tests.support.hf_models import on_disk, random_model
from tests.support.serving import tiny_model
from tests.support.small_tokenizers import BUILDERS, small_tokenizer

IDS = torch.arange(3, 43).view(2, 20)


@pytest.mark.parametrize("name", ["llama tied", "llama untied", "qwen2 tied", "qwen3 untied"])
def test_a_folder_has_every_weight_bit_for_bit_and_the_shape(name, tmp_path):
    """fp32 in the file, so that what was written and what is read must be equal; query and key rows trade places."""
    model = random_model(name)
    write_gguf(model, tmp_path / "model.gguf")
    write_hf_folder(tmp_path / "model.gguf", tmp_path / "folder")
    found, expected = load_file(tmp_path / "folder" / "model.safetensors"), on_disk(model)
    assert found.keys() == expected.keys() - ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(back(IDS).logits, model(IDS).logits)
    assert back.config.rms_norm_eps == model.config.rms_norm_eps == 1e-6  # which fp32 has not


@pytest.mark.parametrize("kind", ["Q8_0", "F16", "BF16"])
def test_transformers_reads_the_same_numbers_from_the_file(kind, tmp_path):
    model = tiny_model(tmp_path / "source", "llama", tied=True, seed=4)
    write_gguf(model, tmp_path / "model.gguf", gguf.GGMLQuantizationType[kind])
    write_hf_folder(tmp_path / "model.gguf", tmp_path / "folder")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
        assert not torch.equal(ours(IDS).logits, model(IDS).logits)


def test_the_tokenizer_comes_with_its_chat_template_and_its_end(tmp_path):
    write_gguf(random_model("llama tied"), tmp_path / "model.gguf")
    write_hf_folder(tmp_path / "model.gguf", tmp_path / "folder")
    found, expected = load_tokenizer(tmp_path / "folder"), small_tokenizer("byte_level")
    for text in ("So 6 * 7 is 42.\n\nThe final answer is 42", "caf\u00e9 \u6700", expected.eos_token):
        assert found.encode(text) == expected.encode(text)
    assert (found.eos_token_id, found.chat_template) == (expected.eos_token_id, CHAT_TEMPLATE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "model.gguf"]


def test_the_file_says_which_tokens_begin_and_end_whatever_transformers_makes_of_it(tmp_path, monkeypatch):
    """transformers 5.16 and 5.17 take the first token of SmolLM2's turns for the last."""
    misread, right = BUILDERS["byte_level"](), small_tokenizer("byte_level").eos_token
    misread.eos_token = misread.bos_token = "a"
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *arguments, **options: misread)
    write_gguf(random_model("llama tied"), tmp_path / "model.gguf")
    file = tmp_path / "model.gguf"
    found = tokenizer_of(file, open_gguf(file))
    assert (found.eos_token, found.bos_token) == (right, "a")  # the file names an end and no beginning


def test_smollm_cuts_a_text_at_every_digit(tmp_path):
    """transformers takes the name for GPT-2's, which leaves the last newline to the digit: other tokens."""
    write_gguf(random_model("llama tied"), tmp_path / "model.gguf", pre="smollm")
    write_hf_folder(tmp_path / "model.gguf", tmp_path / "folder")
    ours = AutoTokenizer.from_pretrained(tmp_path / "folder").backend_tokenizer.pre_tokenizer
    assert [piece for piece, _ in ours.pre_tokenize_str("is\n\n42")] == ["is", "\u010a\u010a", "4", "2"]
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf").backend_tokenizer.pre_tokenizer
    assert [piece for piece, _ in theirs.pre_tokenize_str("is\n\n42")] == ["is", "\u010a", "\u010a", "42"]


def cut_off(file):
    file.write_bytes(file.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("options", "spoil", "line"),
    [
        ({"pre": "tekken"}, None, r"tokenizer.ggml.pre='tekken' is not known here \(gpt-2, llama-bpe, qwen2, smollm"),
        ({"rope.scaling.factor": 4.0}, None, "llama.rope.scaling.factor might change what the model computes"),
        ({}, cut_off, r"cannot be read \(.*Copy the file again"),
        ({}, lambda file: file.unlink(), r"cannot be read \(.*No such file"),
    ],
)
def test_what_is_not_known_is_refused_by_one_line_and_nothing_is_left(options, spoil, line, tmp_path):
    file = tmp_path / "model.gguf"
    write_gguf(random_model("llama tied"), file, **options)
    if spoil:
        spoil(file)
    with pytest.raises(ConfigError, match=line) as caught:
        write_hf_folder(file, tmp_path / "folder")
    assert str(caught.value).startswith(f"GGUF={str(file)!r}: ") and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir() if path != file] == []


@pytest.mark.parametrize(
    ("tensors", "line"),
    [
        ({"rope_freqs.weight": 8}, "tensor rope_freqs.weight is not part of this architecture"),
        ({"output_norm.weight": None}, r"tensor output_norm.weight \(model.norm.weight\) is missing"),
        ({"output_norm.weight": 8}, r"output_norm.weight has shape \(8,\), the metadata asks for \(32,\)"),
    ],
)
def test_a_tensor_too_many_too_few_or_of_another_shape_is_named(tensors, line, tmp_path, monkeypatch):
    """Llama 3's rotary factors are such a tensor: without them the model would be another one."""
    add = gguf.GGUFWriter.add_tensor

    def changed(writer, name, data, **options):
        if name not in tensors:
            add(writer, name, data, **options)

    def closed(writer, write=gguf.GGUFWriter.write_header_to_file):
        for name, length in tensors.items():
            if length is not None:
                add(writer, name, torch.ones(length).numpy())
        write(writer)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", changed)
    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", closed)
    write_gguf(random_model("llama tied"), tmp_path / "model.gguf")
    with pytest.raises(ConfigError, match=line):
        write_hf_folder(tmp_path / "model.gguf", tmp_path / "folder")


def test_another_architecture_and_a_missing_package_are_one_line(tmp_path, monkeypatch):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma3")
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    with pytest.raises(ConfigError, match="architecture 'gemma3' is not one of llama, qwen2, qwen3. Use a model of"):
        write_hf_folder(tmp_path / "model.gguf", tmp_path / "folder")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match="gguf is not installed. pip install"):
        write_hf_folder(tmp_path / "model.gguf", tmp_path / "folder")
