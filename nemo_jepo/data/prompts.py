"""Rows -> Prompt: the prompt as text, its token ids, and the limits on length."""

import unicodedata
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import DataConfig
from nemo_jepo.data.files import BadRow, Row
from nemo_jepo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_TOKENIZED_TOGETHER = 4096


def prompts_of_rows(
    rows: Iterable[Row | BadRow], config: DataConfig, tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[Prompt | BadRow]:
    """One item for every row, in order: its Prompt, or why there is none.

    A row is bad when its prompt or answer is too long, or when the tokenizer cannot write its answer.

    Raises:
        ConfigError: use_chat_template with a tokenizer that has none.
    """
    rows = iter(rows)
    bos = () if config.use_chat_template else _begin_of_text(tokenizer)
    while chunk := list(islice(rows, ROWS_TOKENIZED_TOGETHER)):
        good = [row for row in chunk if isinstance(row, Row)]
        prompts = iter(_encode(tokenizer, [prompt_text(row.question, config, tokenizer) for row in good]))
        answers = iter(_encode(tokenizer, [f" {row.answer}" for row in good]))
        for row in chunk:
            if isinstance(row, BadRow):
                yield row
                continue
            prompt, answer = next(prompts), next(answers)
            prompt = prompt if tuple(prompt[:1]) == bos else [*bos, *prompt]
            problem = _problem(row, prompt, answer, config, tokenizer)
            yield problem or Prompt(
                row.line - 1, tuple(prompt), row.question, row.answer, row.chain_of_thought, row.verifiable
            )


def prompt_text(question: str, config: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The template with the question in its place, wrapped by the tokenizer's chat template if the config says so."""
    text = config.prompt_template.replace("{question}", question)
    if not config.use_chat_template:
        return text
    if tokenizer.chat_template is None:
        raise ConfigError(
            "data.use_chat_template", True, "the tokenizer has no chat template", "Use data.use_chat_template=false"
        )
    system = [] if config.system_prompt is None else [{"role": "system", "content": config.system_prompt}]
    turns = [*system, {"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _begin_of_text(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """The id that this tokenizer itself puts before a text, if it does. A chat template brings its own."""
    bos = tokenizer.bos_token_id
    return (bos,) if bos is not None and tokenizer("a")["input_ids"][0] == bos else ()


def _problem(
    row: Row, prompt: list[int], answer: list[int], config: DataConfig, tokenizer: "PreTrainedTokenizerBase"
) -> BadRow | None:
    """What forbids the row; the end-of-turn id counts as one answer token."""
    if len(prompt) > config.max_prompt_tokens:
        limit = f"{len(prompt)} prompt tokens, more than data.max_prompt_tokens={config.max_prompt_tokens}"
        return BadRow(row.source, row.line, config.prompt_key, limit)
    if len(answer) + 1 > config.max_answer_tokens:
        limit = f"{len(answer) + 1} answer tokens, more than data.max_answer_tokens={config.max_answer_tokens}"
        return BadRow(row.source, row.line, config.answer_key, limit)
    written = tokenizer.decode(answer, clean_up_tokenization_spaces=False)
    if unicodedata.normalize("NFC", written).strip() != unicodedata.normalize("NFC", row.answer):
        return BadRow(row.source, row.line, config.answer_key, f"the tokenizer cannot write it: it reads {written!r}")
    return None
