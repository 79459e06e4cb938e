"""Rows -> Prompt: the prompt as text with its solved examples, its token ids, and the limits on length."""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from nemo_jepo.config.conf_files import examples_file
from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import AnswerConfig, DataConfig
from nemo_jepo.data.examples import Example, solved_examples
from nemo_jepo.data.files import BadRow, Row
from nemo_jepo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_TOKENIZED_TOGETHER = 4096


def prompts_of_rows(
    rows: Iterable[Row | BadRow], config: DataConfig, tokenizer: "PreTrainedTokenizerBase", answer: AnswerConfig
) -> Iterator[Prompt | BadRow]:
    """One item for every row, in order: its Prompt, or why there is none.

    A row is bad when its prompt or answer is too long, or when the tokenizer cannot write its answer.

    Args:
        answer: how solved examples (data.examples) write their answers.
    Raises:
        ConfigError: use_chat_template with a tokenizer that has none, or examples too long for any question.
        DataError: the file of examples has a bad row.
    """
    rows = iter(rows)
    examples = () if config.examples is None else solved_examples(examples_file(config.examples), answer)
    bos = () if config.use_chat_template else _begin_of_text(tokenizer)
    if examples:
        _check_room(examples, config, tokenizer)
    while chunk := list(islice(rows, ROWS_TOKENIZED_TOGETHER)):
        good = [row for row in chunk if isinstance(row, Row)]
        prompts = iter(_encode(tokenizer, [prompt_text(row.question, examples, config, tokenizer) for row in good]))
        answers = iter(_encode(tokenizer, [f" {row.answer}" for row in good]))
        for row in chunk:
            if isinstance(row, BadRow):
                yield row
                continue
            prompt, written = next(prompts), next(answers)
            prompt = prompt if tuple(prompt[:1]) == bos else [*bos, *prompt]
            problem = _problem(row, prompt, written, config, tokenizer)
            yield problem or Prompt(
                row.line - 1, tuple(prompt), row.question, row.answer, row.chain_of_thought, row.verifiable
            )


def prompt_text(
    question: str, examples: Sequence[Example], config: DataConfig, tokenizer: "PreTrainedTokenizerBase"
) -> str:
    """The solved examples, then the template with the question in its place.

    With use_chat_template every template is a user's turn and every completion an assistant's; the tokenizer's chat
    template writes them all. Without it they are plain text, an empty line behind each example.
    """
    asked = [config.prompt_template.replace("{question}", text) for text in (*(e.question for e in examples), question)]
    completions = [example.completion for example in examples]
    if not config.use_chat_template:
        solved = zip(asked, completions, strict=False)  # the last is the question itself
        return "".join(f"{text}{completion}\n\n" for text, completion in solved) + asked[-1]
    if tokenizer.chat_template is None:
        raise ConfigError(
            "data.use_chat_template", True, "the tokenizer has no chat template", "Use data.use_chat_template=false"
        )
    turns = [] if config.system_prompt is None else [{"role": "system", "content": config.system_prompt}]
    for text, completion in zip(asked, completions, strict=False):
        turns += [{"role": "user", "content": text}, {"role": "assistant", "content": completion}]
    turns.append({"role": "user", "content": asked[-1]})
    return str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))


def _check_room(examples: Sequence[Example], config: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise ConfigError where no question would fit behind the examples: every row would be a bad one."""
    (alone,) = _encode(tokenizer, [prompt_text("", examples, config, tokenizer)])
    if len(alone) >= config.max_prompt_tokens:
        rule = f"{len(examples)} examples take {len(alone)} of data.max_prompt_tokens={config.max_prompt_tokens} tokens"
        raise ConfigError("data.examples", config.examples, rule, "Raise that, or give fewer or shorter ones")


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
