"""Rollout -> Spliced: the chain of thought as it was sampled, then the reference answer.

    x + c_i + a*      c_i ends right after the answer marker

Tokens in, tokens out: text is decoded only to find the marker, and c_i's ids are always the sampler's own. Two
properties of tokenizers make this delicate, and each has one home here: a marker may end inside a token
(`Splicer.marker_end`), and " 42" may not encode to the ids that read " 42" after the marker (`Splicer.answer_ids`).

Source: arXiv 2503.19618v2, Section 3 and App. B.2; docs/concepts/splice.md.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import AnswerConfig
from nemo_jepo.data.control_tokens import encode_text, one_line_errors
from nemo_jepo.types import Prompt, Rollout, Spliced

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What a part of a character decodes to."""


@dataclass(frozen=True, slots=True)
class MarkerEnd:
    """Where the first marker of a completion ends."""

    num_tokens: int
    """Tokens up to and including the one in which the marker ends."""
    aligned: bool
    """The marker's end is the end of that token's text."""


class Splicer:
    """Joins prompts, chains of thought and answers into the token rows that are scored.

    Args:
        tokenizer: the one that made the prompts' token ids.
        answer: the marker, and how an answer ends.
    Raises:
        ConfigError: the tokenizer cannot write the marker, or has no end-of-turn id to append.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", answer: AnswerConfig) -> None:
        marker = answer.marker
        suffixes = "|".join(re.escape(marker[start:]) for start in range(len(marker)))
        self._tokenizer = tokenizer
        self._min_cot_tokens = answer.min_cot_tokens
        self._marker_length = len(marker)
        self._marker = re.compile(re.escape(marker), re.IGNORECASE)
        self._marker_suffix = re.compile(suffixes, re.IGNORECASE)
        self._token_texts: dict[int, str] = {}
        self._answer = answer
        self._chain_example = self._encode(f"So {marker}")
        self._end_of_turn = (tokenizer.eos_token_id,) if answer.append_eos else ()
        if self._marker.search(self._text(self._chain_example)) is None:
            raise ConfigError("answer.marker", marker, "the tokenizer cannot write it", "Choose another marker")
        if None in self._end_of_turn:
            raise ConfigError("answer.append_eos", True, "the tokenizer has no end-of-text token", "Use false")

    # The marker.

    def stop_after(self, token_ids: Sequence[int]) -> bool:
        """Whether the last token completes the marker. Ask after every token; the first yes is final.

        Costs a look-up for nearly every token, and the decoding of a few tokens for the rest.
        """
        return self._overhang(token_ids, len(token_ids)) is not None

    def marker_end(self, token_ids: Sequence[int]) -> MarkerEnd | None:
        """Where the first marker ends: the fewest tokens whose text contains it, in any case; None where none do.

        Special tokens are part of the text.
        """
        for num_tokens in range(1, len(token_ids) + 1):
            overhang = self._overhang(token_ids, num_tokens)
            if overhang is not None:
                return MarkerEnd(num_tokens, aligned=overhang == "")
        return None

    def marker_span(self, token_ids: Sequence[int]) -> tuple[int, int] | None:
        """The first marker's tokens, [first, one after the last); the outer two may hold other text as well."""
        end = self.marker_end(token_ids)
        return None if end is None else (self._marker_start(token_ids, end), end.num_tokens)

    def _marker_start(self, token_ids: Sequence[int], end: MarkerEnd) -> int:
        """The token in which a marker starts that ends there."""
        start = end.num_tokens - 1
        while start > 0 and self._marker.search(self._text(token_ids[start : end.num_tokens])) is None:
            start -= 1
        return start

    def own_answer_text(self, rollout: Rollout) -> str | None:
        """The sample's own answer, for people and verifiers: what follows the marker, without special tokens."""
        end = self.marker_end(rollout.token_ids)
        if end is None:
            return None
        overhang = self._overhang(rollout.token_ids, end.num_tokens) or ""
        rest = self._tokenizer.decode(
            list(rollout.token_ids[end.num_tokens :]), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return (overhang + rest).strip()

    def _overhang(self, token_ids: Sequence[int], num_tokens: int) -> str | None:
        """What the last of the first num_tokens says after the marker, if it completes it; else None."""
        if num_tokens == 0 or not self._may_end_marker(token_ids[num_tokens - 1]):
            return None
        text = self._text(token_ids[self._tail_start(token_ids, num_tokens) : num_tokens])
        marker = self._marker.search(text)
        return None if marker is None else text[marker.end() :]

    def _may_end_marker(self, token_id: int) -> bool:
        """Whether the token holds the whole marker, starts with its last characters, or holds part of a character."""
        text = self._token_text(token_id)
        return bool(REPLACEMENT in text or self._marker_suffix.match(text) or self._marker.search(text))

    def _tail_start(self, token_ids: Sequence[int], num_tokens: int) -> int:
        """The last token from which on the text must hold the marker, if the token num_tokens - 1 completes it.

        Before that token the text needs room for all but one character of the marker, and for one space, which
        decoders drop from the beginning. Parts of characters do not count, so it never starts inside a character,
        where the decoder would spoil what follows.
        """
        start, num_characters = num_tokens - 1, 0
        while start > 0 and num_characters < self._marker_length:
            start -= 1
            text = self._token_text(token_ids[start])
            num_characters += 0 if REPLACEMENT in text else len(text)
        return start

    def _token_text(self, token_id: int) -> str:
        """A token's text inside a sentence: alone, a decoder would drop its leading space."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._text([token_id, token_id]).removeprefix(self._text([token_id]))
            self._token_texts[token_id] = text
        return text

    # The answer.

    def answer_ids(self, answer: str) -> tuple[int, ...]:
        """The ids that read " " + answer after the marker, and the end-of-turn id if the answer ends with it.

        Some tokenizers put a space before every text they encode, so that of " 42" and "42" only one reads " 42".
        Texts are compared in Unicode's composed form (NFC), which some tokenizers write.

        Raises:
            ValueError: neither does; the tokenizer cannot write this answer.
        """
        chain = self._text(self._chain_example)
        wanted = unicodedata.normalize("NFC", f"{chain} {answer}")
        for text in (f" {answer}", answer):
            ids = self._encode(text)
            if unicodedata.normalize("NFC", self._text([*self._chain_example, *ids])) == wanted:
                return (*ids, *self._end_of_turn)
        raise ValueError(f"the tokenizer cannot write the answer {answer!r} after {chain!r}. Remove the row.")

    # The sequences.

    def splice_reference(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[Spliced]:
        """One sequence per rollout, for the objectives that score the reference answer.

            valid:    x + c_i + a*      the marker is there, ends with a token, and the chain is long enough
            invalid:  x + y_i
            failed:   x

        Args:
            prompts: [P], indexed by `Rollout.group`.
            rollouts: [N], in any order.
        Returns:
            [N], in the order of rollouts.
        """
        groups = {rollout.group for rollout in rollouts}
        answers = {group: self.answer_ids(prompts[group].answer) for group in groups}
        spliced = []
        for rollout in rollouts:
            end = self.marker_end(rollout.token_ids)
            valid = end is not None and end.aligned and self._long_enough(rollout, end)
            answer = answers[rollout.group] if valid else ()
            joined = self._spliced(prompts[rollout.group], rollout, end, valid, answer)
            spliced.append(dataclasses.replace(joined, ends=joined.valid and bool(self._end_of_turn)))
        return spliced

    def splice_own(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[Spliced]:
        """One sequence per rollout, for the objectives that verify the sample's own answer: x + y_i = x + c_i + a_i.

        Nothing is joined, so a marker that ends inside a token (which is then c_i's) does not make a sample invalid.
        Arguments and order as in `splice_reference`.
        """
        spliced = []
        for rollout in rollouts:
            end = self.marker_end(rollout.token_ids)
            valid = end is not None and self._long_enough(rollout, end)
            own = rollout.token_ids[end.num_tokens :] if end is not None and valid else ()
            joined = self._spliced(prompts[rollout.group], rollout, end, valid, own)
            if not joined.failed:
                joined = dataclasses.replace(joined, own_answer=True, generation_logprobs=rollout.generation_logprobs)
            spliced.append(joined)
        return spliced

    def supervised(self, prompts: Sequence[Prompt], target: str) -> list[Spliced]:
        """One sequence per prompt with nothing sampled, by target (objective.sft_target).

            answer              x + a*
            marked_answer       x + "The final answer is" + a*
            chain_of_thought    x + golden c + "The final answer is" + a*

        The marker has a line of its own; a prompt without a golden chain gets that line alone. Chain and answer are
        encoded apart, so the chain ends with a token as a sampled one does.
        """
        chains = [self._supervised_chain(prompt, target) for prompt in prompts]
        answers = [self.answer_ids(prompt.answer) for prompt in prompts]
        return [
            Spliced(
                group=group,
                sample=0,
                token_ids=prompt.token_ids + chain + answer,
                prompt_length=len(prompt.token_ids),
                chain_length=len(chain),
                answer_length=len(answer),
                valid=True,
                has_marker=True,
            )
            for group, (prompt, chain, answer) in enumerate(zip(prompts, chains, answers, strict=True))
        ]

    def _supervised_chain(self, prompt: Prompt, target: str) -> tuple[int, ...]:
        if target == "answer":
            return ()
        golden = prompt.chain_of_thought if target == "chain_of_thought" else None
        return tuple(self._encode(self._answer.up_to_answer(golden)))

    def _spliced(
        self, prompt: Prompt, rollout: Rollout, end: MarkerEnd | None, valid: bool, answer: tuple[int, ...]
    ) -> Spliced:
        """x + c_i + answer for a valid sample, x + y_i for an invalid one, x for one that failed."""
        failed = rollout.finish_reason == "failed"
        if failed:
            end, valid, answer, chain_length = None, False, (), 0
        else:
            chain_length = end.num_tokens if end is not None and valid else len(rollout.token_ids)
        marker_length = end.num_tokens - self._marker_start(rollout.token_ids, end) if end is not None and valid else 0
        return Spliced(
            group=rollout.group,
            sample=rollout.sample,
            token_ids=prompt.token_ids + rollout.token_ids[:chain_length] + answer,
            prompt_length=len(prompt.token_ids),
            chain_length=chain_length,
            answer_length=len(answer),
            valid=valid,
            has_marker=end is not None,
            misaligned=end is not None and not end.aligned,
            marker_length=marker_length,
            failed=failed,
            generation_logprobs=rollout.generation_logprobs[:chain_length],
        )

    def _long_enough(self, rollout: Rollout, end: MarkerEnd) -> bool:
        """Whether min_cot_tokens whole tokens stand before the marker: without them the marker is still there."""
        return self._marker.search(self._text(rollout.token_ids[self._min_cot_tokens : end.num_tokens])) is not None

    def _encode(self, text: str) -> list[int]:
        return encode_text(self._tokenizer, text)

    def _text(self, token_ids: Sequence[int]) -> str:
        """The text with its special tokens, exactly as the tokens spell it."""
        with one_line_errors(self._tokenizer):
            return self._tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False)
