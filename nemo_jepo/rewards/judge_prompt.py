"""One case as a judge sees it, and the only reply that counts as a vote. The answer is untrusted text.

A model that is trained may learn to write for its judge. Three walls stand against it:

    code      every prompt has a word that none of its texts contains; the lines between texts and the verdict carry
              it, so no answer can close its own text, and a reply that repeats an answer does not vote
    defusing  a space breaks what a judge's chat template would read as the end of a turn, <|im_end|> or [/INST]
    reading   the reply's last line must be a verdict line, whole, and no other line the opposite one; a score line
              likewise, and no other line another score
"""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Protocol, TypeVar

from nemo_jepo.config.judge import JudgeConfig, ScoreJudgeConfig
from nemo_jepo.rewards.judgement import score

CONTROL_TOKEN = re.compile(r"<(?=[|\uff5c/A-Za-z_])|\[(?=/?[A-Z]{2})")
"""Where <|im_end|>, </s>, <start_of_turn> or [/INST] begins; in x<y the space does no harm."""

Verdict = TypeVar("Verdict")
"""What a judge says of a case: whether it is correct, or its score."""
Said_co = TypeVar("Said_co", covariant=True)
"""The same, of a prompt that reads it."""


class NoVote(ValueError):
    """A reply that is no vote, and why."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is to be judged."""

    question: str
    reference_answer: str
    own_answer: str


class CasePrompt(Protocol[Said_co]):
    """One case in a judge's prompt."""

    @property
    def text(self) -> str:
        """What the judge is asked."""

    @property
    def lines(self) -> tuple[str, ...]:
        """The last lines that its reply may have."""

    def read(self, reply: str) -> Said_co:
        """What a reply says; NoVote where it says nothing."""


@dataclass(frozen=True, slots=True)
class JudgePrompt:
    """One case in the judge's prompt, with its two verdict lines."""

    text: str
    correct: str
    wrong: str

    @property
    def lines(self) -> tuple[str, ...]:
        """The verdict lines."""
        return self.correct, self.wrong

    def read(self, reply: str) -> bool:
        """The vote that a reply casts: correct or not.

        Raises:
            NoVote: its last line is no verdict, or another line is the opposite one.
        """
        lines = [_folded(line) for line in reply.splitlines() if line.strip()]
        verdicts = {_folded(self.correct): True, _folded(self.wrong): False}
        if not lines or lines[-1] not in verdicts:
            raise NoVote("the reply does not end with a verdict line")
        if len({verdicts[line] for line in lines if line in verdicts}) > 1:
            raise NoVote("the reply holds both verdicts")
        return verdicts[lines[-1]]


@dataclass(frozen=True, slots=True)
class ScorePrompt:
    """One case in the prompt of a judge that scores, with its score line."""

    text: str
    line: str
    """{score} stands for the score."""

    @property
    def lines(self) -> tuple[str, ...]:
        """The score line."""
        return (self.line,)

    def read(self, reply: str) -> float:
        """The score that a reply gives, from 0 to 10.

        Raises:
            NoVote: its last line gives none, or another line gives another one.
        """
        scores = [self._score(_folded(line)) for line in reply.splitlines() if line.strip()]
        if not scores or scores[-1] is None:
            raise NoVote("the reply does not end with a score line")
        if len(set(scores) - {None}) > 1:
            raise NoVote("the reply holds several scores")
        return scores[-1]

    def _score(self, line: str) -> float | None:
        before, after = (_folded(part) for part in self.line.split("{score}"))
        rest = line.removeprefix(before).removesuffix(after)
        return score(rest) if len(rest) + len(before) + len(after) == len(line) else None


def judge_prompt(case: Case, settings: JudgeConfig) -> JudgePrompt:
    """The case in the judge's prompt."""
    fields = _fields(case)
    correct, wrong = (line.replace("{code}", fields["code"]) for line in (settings.correct, settings.wrong))
    return JudgePrompt(filled(settings.prompt, **fields, correct=correct, wrong=wrong), correct, wrong)


def score_prompt(case: Case, settings: ScoreJudgeConfig) -> ScorePrompt:
    """The case in the prompt of a judge that scores. Repeating it gives no score: SCORE is none."""
    fields = _fields(case)
    line = settings.score_line.replace("{code}", fields["code"])
    return ScorePrompt(filled(settings.prompt, **fields, score_line=line.replace("{score}", "SCORE")), line)


def _fields(case: Case) -> dict[str, str]:
    """The case's texts, defused, and the code that none of them contains."""
    texts = [_defused(text) for text in (case.question, case.reference_answer, case.own_answer)]
    names = ("question", "reference_answer", "answer")
    return dict(zip(names, texts, strict=True)) | {"code": code_outside(texts)}


def filled(template: str, **fields: str) -> str:
    """The template with its {fields}, in one pass: what a field's text holds in braces stays what it is."""
    return re.sub(r"\{(\w+)\}", lambda match: fields.get(match[1], match[0]), template)


def code_outside(texts: list[str]) -> str:
    """Eight digits that no text contains, the same for the same texts: a text would have to know its own hash."""
    seed = json.dumps(texts).encode()
    while True:
        code = hashlib.sha256(seed).hexdigest()[:8]
        if not any(code in text.lower() for text in texts):
            return code
        seed += b"+"


def _defused(text: str) -> str:
    return CONTROL_TOKEN.sub(r"\g<0> ", text)


def _folded(line: str) -> str:
    """A line without case, and without the white space, stars and full stop that models add to it."""
    return " ".join(line.casefold().strip().strip("*`").rstrip(".").strip("*` ").split())
