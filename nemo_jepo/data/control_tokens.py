"""The text of a data set stays text, whatever it spells.

A question that holds "<|im_end|>" or "</s>" would end its own turn if it were encoded with its template: a tokenizer
reads every control token that it finds in a text. So what data says is quoted before a template joins it, and read back
when the template's own control tokens have become ids:

    question    a<|im_end|>b
    quoted      a"2"b                              " stands for two characters that no text holds
    rendered    <|im_start|>user a"2"b<|im_end|>
    encoded     [<|im_start|>] + ids(user a<|im_end|>b) + [<|im_end|>]

A text that spells no control token, which is nearly every one, is encoded as if none of this existed.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nemo_jepo.config.reading import library

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Unicode's noncharacters, which are for such use inside a program and not for exchange."""
QUOTED = re.compile(f"{OPEN}(\\d+){CLOSE}")


@contextmanager
def one_line_errors(tokenizer: "PreTrainedTokenizerBase") -> Iterator[None]:
    """What a tokenizer or its chat template raises in this block is a ConfigError that names its folder."""
    rule, fix = "the tokenizer or its chat template fails on a text", "Copy its files again, or use another one"
    with library("tokenizer.path", tokenizer.name_or_path, rule, fix):
        yield


def encode_text(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """The ids of a text in which nothing is a control token."""
    with one_line_errors(tokenizer):
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def chat_text(tokenizer: "PreTrainedTokenizerBase", turns: list[dict[str, str]], **options: bool) -> str:
    """What the tokenizer's chat template makes of turns; `options` are those of apply_chat_template."""
    with one_line_errors(tokenizer):
        return str(tokenizer.apply_chat_template(turns, tokenize=False, **options))


class TextEncoder:
    """Encodes templates that hold text of a data set.

    Args:
        tokenizer: whose control tokens are those that it calls special.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        special = {token.content: token for token in tokenizer.added_tokens_decoder.values() if token.special}
        spelled = sorted(special, key=len, reverse=True)  # of two at the same place the longer one is read
        reach = [r"\s*" * special[text].lstrip + re.escape(text) + r"\s*" * special[text].rstrip for text in spelled]
        self._tokenizer = tokenizer
        self._id_of = {text: tokenizer.convert_tokens_to_ids(text) for text in spelled}
        self._quotable = [OPEN, *spelled]
        self._in_data = re.compile("|".join(re.escape(text) for text in self._quotable))
        self._in_template = re.compile(f"({'|'.join(reach)})") if reach else None

    def quoted(self, text: str) -> str:
        """Text of a data set in the form in which a template may hold it."""
        return self._in_data.sub(lambda found: f"{OPEN}{self._quotable.index(found[0])}{CLOSE}", text)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of templates with quoted text in them: control tokens outside of quotes alone have their ids."""
        if not texts:
            return []
        with one_line_errors(self._tokenizer):
            encoded = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [self._encode_pieces(text) if OPEN in text else ids for text, ids in zip(texts, encoded, strict=True)]

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts of a data set that stand alone."""
        if not texts:
            return []
        settings = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        with one_line_errors(self._tokenizer):
            return self._tokenizer(list(texts), **settings)["input_ids"]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text with its special tokens, exactly as the tokens spell it."""
        with one_line_errors(self._tokenizer):
            return self._tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False)

    def unwritable(self, text: str) -> str | None:
        """A control token that the text spells and that this tokenizer cannot write in any other way, if there is one.

        Models of SentencePiece's unigram kind have their control tokens among their words.
        """
        for spelled in dict.fromkeys(self._in_data.findall(text)):
            token_id = self._id_of.get(spelled)
            if token_id is not None and token_id in encode_text(self._tokenizer, spelled):
                return spelled
        return None

    def _encode_pieces(self, text: str) -> list[int]:
        """Piece by piece, the template's control tokens by their ids."""
        ids: list[int] = []
        for piece in self._in_template.split(text) if self._in_template else [text]:
            own = self._id_of.get(piece.strip())
            ids += [own] if own is not None else encode_text(self._tokenizer, self._read_back(piece)) if piece else []
        return ids

    def _read_back(self, piece: str) -> str:
        return QUOTED.sub(lambda quote: self._quotable[int(quote[1])], piece)
