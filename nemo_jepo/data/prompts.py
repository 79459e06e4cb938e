"""Rows -> Prompt: the prompt as text with its solved examples, its token ids, and the limits on length."""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from nemo_jepo.config.conf_files import examples_file
from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import AnswerConfig, DataConfig
from nemo_jepo.data.control_tokens import TextEncoder, chat_text, one_line_errors
from nemo_jepo.data.examples import solved_examples
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
    rows, writer = iter(rows), PromptWriter(config, tokenizer, answer)
    while chunk := list(islice(rows, ROWS_TOKENIZED_TOGETHER)):
        good = [row for row in chunk if isinstance(row, Row)]
        prompts = iter(writer.prompts([row.question for row in good]))
        answers = iter(writer.encoder.encode_plain([f" {row.answer}" for row in good]))
        for row in chunk:
            if isinstance(row, BadRow):
                yield row
                continue
            prompt, written = next(prompts), next(answers)
            yield _problem(row, prompt, written, config, writer.encoder) or Prompt(
                prompt_id=row.line - 1,
                token_ids=tuple(prompt),
                question=row.question,
                answer=row.answer,
                chain_of_thought=row.chain_of_thought,
                verifiable=row.verifiable,
                task_entry=row.task_entry,
                cluster=row.cluster,
                group_key=row.group,
            )


class PromptWriter:
    """Writes questions as prompts: solved examples, template and chat template around them.

    Arguments and errors: see `prompts_of_rows`.
    """

    def __init__(self, config: DataConfig, tokenizer: "PreTrainedTokenizerBase", answer: AnswerConfig) -> None:
        if config.use_chat_template and tokenizer.chat_template is None:
            rule, fix = "the tokenizer has no chat template", "Use data.use_chat_template=false"
            raise ConfigError("data.use_chat_template", True, rule, fix)
        self.encoder = TextEncoder(tokenizer)
        self._config, self._tokenizer = config, tokenizer
        self._begin = () if config.use_chat_template else _begin_of_text(tokenizer)
        self._solved: list[tuple[str, str]] = []
        """What a user asks and what a model answers, of each example."""
        if config.examples is not None:
            for example in solved_examples(examples_file(config.examples), answer):
                self._solved.append((self._asked(example.question), self.encoder.quoted(example.completion)))
            self._check_room()

    def prompts(self, questions: Sequence[str]) -> list[list[int]]:
        """The ids of every question's prompt, which begin as this tokenizer begins a text."""
        encoded = self.encoder.encode([self._text(question) for question in questions])
        return [ids if tuple(ids[:1]) == self._begin else [*self._begin, *ids] for ids in encoded]

    def _text(self, question: str) -> str:
        """The solved examples, then the template with the question in its place; what rows say is quoted.

        With use_chat_template every template is a user's turn and every completion an assistant's; the tokenizer's
        chat template writes them all. Without it they are plain text, an empty line behind each example.
        """
        if not self._config.use_chat_template:
            return "".join(f"{asked}{completion}\n\n" for asked, completion in self._solved) + self._asked(question)
        system = self._config.system_prompt
        turns = [] if system is None else [{"role": "system", "content": system}]
        for asked, completion in self._solved:
            turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": completion}]
        turns.append({"role": "user", "content": self._asked(question)})
        return chat_text(self._tokenizer, turns, add_generation_prompt=True)

    def _asked(self, question: str) -> str:
        return self._config.prompt_template.replace("{question}", self.encoder.quoted(question))

    def _check_room(self) -> None:
        """Raise ConfigError where no question would fit behind the examples: every row would be a bad one."""
        (alone,) = self.prompts([""])
        limit = self._config.max_prompt_tokens
        if len(alone) >= limit:
            rule = f"{len(self._solved)} examples take {len(alone)} of data.max_prompt_tokens={limit} tokens"
            fix = "Raise that, or give fewer or shorter ones"
            raise ConfigError("data.examples", self._config.examples, rule, fix)


def _begin_of_text(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """The id that this tokenizer itself puts before a text, if it does. A chat template brings its own."""
    bos = tokenizer.bos_token_id
    with one_line_errors(tokenizer):
        return (bos,) if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else ()


def _problem(row: Row, prompt: list[int], answer: list[int], config: DataConfig, encoder: TextEncoder) -> BadRow | None:
    """What forbids the row; the end-of-turn id counts as one answer token."""
    if len(prompt) > config.max_prompt_tokens:
        limit = f"{len(prompt)} prompt tokens, more than data.max_prompt_tokens={config.max_prompt_tokens}"
        return BadRow(row.source, row.line, config.prompt_key, limit)
    if len(answer) + 1 > config.max_answer_tokens:
        limit = f"{len(answer) + 1} answer tokens, more than data.max_answer_tokens={config.max_answer_tokens}"
        return BadRow(row.source, row.line, config.answer_key, limit)
    texts = {config.prompt_key: row.question, config.answer_key: row.answer}
    if row.chain_of_thought is not None:
        texts[config.chain_of_thought_key or "chain of thought"] = row.chain_of_thought
    for key, text in texts.items():
        token = encoder.unwritable(text)
        if token is not None:
            problem = f"the tokenizer cannot write {token!r} as text, only as its control token"
            return BadRow(row.source, row.line, key, problem)
    written = encoder.decode(answer)
    if unicodedata.normalize("NFC", written).strip() != unicodedata.normalize("NFC", row.answer):
        return BadRow(row.source, row.line, config.answer_key, f"the tokenizer cannot write it: it reads {written!r}")
    return None
