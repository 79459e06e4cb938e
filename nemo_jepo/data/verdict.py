"""Self-verification: behind its own answer a sample is asked whether it is right, and learns to say so.

    x + c_i + a_i + question + verdict        verdict: yes where the reward is 1, no where it is 0

Nothing stands behind the verdict, and what stands before it does not see it: chain and answer keep their log-probs.

Source: arXiv 2505.04842 (RL^V).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import SelfVerificationConfig
from nemo_jepo.data.control_tokens import encode_text
from nemo_jepo.types import Prompt, Spliced

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class VerdictWriter:
    """Puts the question and a verdict behind own answers.

    Args:
        tokenizer: of the run.
        settings: question and verdicts.
    Raises:
        ConfigError: both verdicts are the same tokens.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", settings: SelfVerificationConfig) -> None:
        self._question = tuple(encode_text(tokenizer, settings.question))
        self._verdicts = {
            True: tuple(encode_text(tokenizer, settings.yes)),
            False: tuple(encode_text(tokenizer, settings.no)),
        }
        if self._verdicts[True] == self._verdicts[False] or not all(self._verdicts.values()):
            rule = "the two verdicts must differ, and be written, in this tokenizer's tokens"
            given = [settings.yes, settings.no]
            raise ConfigError("self_verification.yes, self_verification.no", given, rule, "Use ' Yes' and ' No'")

    @property
    def num_tokens(self) -> int:
        """The most that a sequence grows by."""
        return len(self._question) + max(map(len, self._verdicts.values()))

    def targets(
        self, prompts: Sequence[Prompt], sequences: Sequence[Spliced], rewards: Sequence[float | None]
    ) -> list[Spliced]:
        """The sequences, those with an own answer and a reward with their verdict.

        A prompt that no verifier can grade has none: its answers are called wrong whatever they are.
        """
        return [
            self.append(sequence, reward > 0)
            if reward is not None and _has_own_answer(sequence) and prompts[sequence.group].verifiable
            else sequence
            for sequence, reward in zip(sequences, rewards, strict=True)
        ]

    def claims(self, sequences: Sequence[Spliced]) -> list[Spliced]:
        """The sequences, each that has an own answer with the verdict yes behind it: what an evaluation scores."""
        return [self.append(one, True) if _has_own_answer(one) else one for one in sequences]

    def append(self, sequence: Spliced, verdict: bool) -> Spliced:
        """One sequence with question and verdict."""
        words = self._verdicts[verdict]
        return replace(
            sequence,
            token_ids=sequence.token_ids + self._question + words,
            question_length=len(self._question),
            verdict_length=len(words),
            verdict=verdict,
        )


def _has_own_answer(sequence: Spliced) -> bool:
    return sequence.own_answer and sequence.valid
