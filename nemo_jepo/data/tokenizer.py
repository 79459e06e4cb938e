"""The tokenizer: read from a folder, or trained on a small data set."""

import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from nemo_jepo.config.errors import ConfigError, shown
from nemo_jepo.config.reading import held_stderr, library, read_json, require_model_files
from nemo_jepo.data.control_tokens import TextEncoder, chat_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY = "tokenizer.path"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
PAD, END_OF_TEXT = "<|pad|>", "<|endoftext|>"
ANSWER = "an answer"
"""Of an assistant, to see what a chat template puts behind it."""
PROBE = "So 6 * 7 = 42, na\u00efve \u7b54\u6848"
"""Encoded once, to see a tokenizer that was damaged fail before there is a row to blame."""

log = logging.getLogger(__name__)


def load_tokenizer(path: str | Path, use_chat_template: bool = False) -> "PreTrainedTokenizerBase":
    """The Hugging Face tokenizer of a folder: no download, no code from the folder.

    Args:
        use_chat_template: the end-of-text token is the one that ends an assistant's turn in the chat template, whatever
            the folder calls it: answers would be taught to end with a token that no chat holds otherwise.
    Raises:
        ConfigError: the folder holds no tokenizer, one that cannot be read, or one without an end-of-text token.
    """
    from transformers import AutoTokenizer  # seconds to import

    # Without this check transformers makes an empty tokenizer for some config.json.
    if not any(os.path.lexists(Path(path) / name) for name in TOKENIZER_FILES):
        rule = f"holds no tokenizer ({', '.join(TOKENIZER_FILES)})"
        raise ConfigError(KEY, str(path), rule, "Give a folder with tokenizer.json")
    require_model_files(KEY, path)
    _require_own_files(Path(path) / "tokenizer_config.json")
    with library(KEY, str(path), "transformers refuses its tokenizer", "Copy its files again"), held_stderr():
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        TextEncoder(tokenizer).encode_plain([PROBE])
        tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.chat_template  # noqa: B018 (they look things up)
    if use_chat_template and (end := _end_of_turn(tokenizer)) not in (None, tokenizer.eos_token):
        told = "An answer ends with %r, as turns do in the chat template; %s calls %r the end of a text"
        log.warning(told, end, path, tokenizer.eos_token)
        tokenizer.eos_token = end
    if tokenizer.eos_token_id is None:
        rule = "has no end-of-text token, so an answer could not end"
        raise ConfigError(KEY, str(path), rule, "Add eos_token to its tokenizer_config.json")
    return tokenizer


def _require_own_files(settings: Path) -> None:
    """Raise ConfigError where tokenizer_config.json names files of another folder: transformers would open them."""
    if not settings.exists():
        return
    names = read_json(KEY, settings).get("fast_tokenizer_files", [])
    if not isinstance(names, list) or any(Path(str(name)).name != name for name in names):
        rule = f"fast_tokenizer_files={shown(names)} must be names of files beside it"
        raise ConfigError(KEY, str(settings), rule, "Leave it out")


def _end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """The control token behind an assistant's turn in the chat template; None where there is no template or no such
    token."""
    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": ANSWER}]
    behind = chat_text(tokenizer, turns).rpartition(ANSWER)[2].lstrip()
    control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return max((token for token in control if behind.startswith(token)), key=len, default=None)


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | Path) -> "PreTrainedTokenizerBase":
    """A byte-level BPE trained on texts, saved in folder as `load_tokenizer` reads it.

    It writes any text (all 256 bytes are in it). Every digit is a token of its own, so that small models can learn
    arithmetic. The folder appears whole or not at all: it is written under another name and renamed.

    Args:
        vocab_size: most tokens, <|pad|> and <|endoftext|> included; at least 258. Few texts may give fewer.
    Raises:
        FileExistsError: folder exists.
    """
    from transformers import PreTrainedTokenizerFast

    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists. Load it, or remove it.")
    bpe = tokenizers.Tokenizer(models.BPE())
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, eos_token=END_OF_TEXT)
    unfinished = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    fast.save_pretrained(unfinished)
    unfinished.rename(folder)
    return load_tokenizer(folder)
