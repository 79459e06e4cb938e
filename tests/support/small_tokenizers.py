"""Small real tokenizers, one for every way in which a space may stick to a token. Trained when first asked for."""

import functools
import json
import tempfile
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;#=+-*\n"
FOREIGN = "\u00e9\u00df\u044f\u6700\u7ec8\u7b54\u6848\u662f\U0001f600"
"""Characters of two, three and four bytes."""
CORPUS = [
    "So 6 * 7 is 42.\nThe final answer is 42",
    "The final answer is: 17. Then add 5 to it; the final answer is 22.",
    "Thus this is his, as is the final step: answer the question #### 12",
] * 4
END = "<|endoftext|>"


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, clean_up_tokenization_spaces=False)


def _byte_level(add_prefix_space: bool, use_regex: bool = True) -> Tokenizer:
    """GPT-2's kind. Without its regular expression, merges run across words and punctuation."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _with_normalizer(tokenizer: Tokenizer, normalizer: normalizers.Normalizer) -> Tokenizer:
    tokenizer.normalizer = normalizer
    return tokenizer


def _metaspace(prepend_scheme: str) -> Tokenizer:
    """SentencePiece's kind of unigram model, without byte tokens: what is not in its alphabet is unknown."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=["<unk>", END],
        unk_token="<unk>",
        initial_alphabet=list(LETTERS + FOREIGN),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CORPUS, LETTERS, FOREIGN], trainer)
    return tokenizer


def _llama_like() -> Tokenizer:
    """Llama 2's kind: a space before every text, by the normaliser; foreign characters as bytes <0x..>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=160,
        special_tokens=["<unk>", END],
        initial_alphabet=list(LETTERS),
        max_token_length=8,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    serialised = json.loads(tokenizer.to_str())
    vocabulary = serialised["model"]["vocab"]
    vocabulary.update({f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)})
    serialised["model"]["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(serialised))


def _sentencepiece() -> PreTrainedTokenizerBase:
    """A model file written by the sentencepiece library itself, read by transformers."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = Path(tempfile.mkdtemp())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS + list(LETTERS)),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": True}))
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


BUILDERS = {
    "byte_level": lambda: _wrapped(_byte_level(add_prefix_space=False)),
    "byte_level_prefix_space": lambda: _wrapped(_byte_level(add_prefix_space=True)),
    "byte_level_across_words": lambda: _wrapped(_byte_level(add_prefix_space=False, use_regex=False)),
    "byte_level_nfc": lambda: _wrapped(_with_normalizer(_byte_level(add_prefix_space=False), normalizers.NFC())),
    "metaspace_always": lambda: _wrapped(_metaspace("always")),
    "metaspace_first": lambda: _wrapped(_metaspace("first")),
    "metaspace_never": lambda: _wrapped(_metaspace("never")),
    "llama_like": lambda: _wrapped(_llama_like()),
    "sentencepiece": _sentencepiece,
}


@functools.cache
def small_tokenizer(kind: str) -> PreTrainedTokenizerBase:
    """One of BUILDERS, the same object each time."""
    return BUILDERS[kind]()
