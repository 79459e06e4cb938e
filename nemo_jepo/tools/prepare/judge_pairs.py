"""`nemo-jepo data prepare judge_pairs`: pairs of a good and a bad answer -> prompts that ask for a judgement.

    verdict    (question, A, B) and (question, B, A)    "The final answer is A"
    scores     the same                                 "The final answer is A: 7.5, B: 3"
    score      (question, good) and (question, bad)     "The final answer is 7.5"
    graded     the same, with the reference answer      "The final answer is correct"

Where good answers are written in other words than the reference answers, a column of those is read for the form graded.
A judge whose good answers are all the reference answer itself learns to compare texts.

Both prompts of a pair have the same `group`, which data.group_key=group keeps together. Where a file has no bad
answers, they are found:

    neighbour      the good answer to the question that shares most words with this one, a stand-in for an answer to a
                   changed instruction
    FILE           answers that were sampled and are known to be wrong

Source: arXiv 2505.10320 (J1): bad answers from changed instructions, which another model writes there, and from samples
with another result.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from nemo_jepo.config.errors import ConfigError, DataError
from nemo_jepo.config.judge import GRADE_PROMPT
from nemo_jepo.data.files import BadRow, read_records
from nemo_jepo.rewards.judge_prompt import filled
from nemo_jepo.tools.prepare.records import Example, Rows, Splits, as_text
from nemo_jepo.tools.prepare.text import question_key, words

JUDGE_PAIRS = "judge_pairs"
"""The NAME that stands for it."""
NEIGHBOUR = "neighbour"
RAREST_WORDS = 8
"""Words of a question, those that fewest others have, whose questions are compared with it."""

COMPARE = """\
Which of two answers to a question is better?

Question:
{question}

Answer A:
{a}

Answer B:
{b}

"""
ASK_VERDICT = 'Compare both with what the question asks. Then write "The final answer is A" or "The final answer is B".'
ASK_SCORES = (
    "Compare both with what the question asks. Then give each a score from 0 to 10, with at most one decimal: "
    '"The final answer is A: 7.5, B: 3".'
)
ASK_SCORE = """\
How good is an answer to a question?

Question:
{question}

Answer:
{answer}

Think about what the question asks. Then give a score from 0 to 10, with at most one decimal: \
"The final answer is 7.5"."""


class Judged(NamedTuple):
    """One question with an answer that is good and one that is bad."""

    question: str
    good: str
    bad: str
    reference: str | None = None
    """The reference answer, which the form graded shows; None: the good answer itself."""


class Row(NamedTuple):
    """What a file says of one pair."""

    question: str
    good: str
    bad: str | None
    reference: str | None

    @property
    def result(self) -> str:
        """What tells whether two answers are the same one."""
        return question_key(self.reference or self.good)


@dataclass(frozen=True, slots=True)
class PairKeys:
    """The columns of a file of pairs."""

    question: str = "question"
    good: str = "answer"
    bad: str | None = None
    reference: str | None = None


def _verdict(ask: str) -> Callable[[Judged], Iterator[tuple[str, str]]]:
    def prompts(pair: Judged) -> Iterator[tuple[str, str]]:
        for a, b, better in ((pair.good, pair.bad, "A"), (pair.bad, pair.good, "B")):
            yield filled(COMPARE + ask, question=pair.question, a=a, b=b), better

    return prompts


def _score(pair: Judged) -> Iterator[tuple[str, str]]:
    for answer, which in ((pair.good, "good"), (pair.bad, "bad")):
        yield filled(ASK_SCORE, question=pair.question, answer=answer), which


def _graded(pair: Judged) -> Iterator[tuple[str, str]]:
    for answer, which in ((pair.good, "correct"), (pair.bad, "wrong")):
        reference = pair.reference or pair.good
        yield filled(GRADE_PROMPT, question=pair.question, reference_answer=reference, answer=answer), which


FORMS = {"verdict": _verdict(ASK_VERDICT), "scores": _verdict(ASK_SCORES), "score": _score, "graded": _graded}
"""--form -> the two (prompt, reference answer) of a pair."""


def read_pairs(path: Path, keys: PairKeys) -> tuple[list[Row], Counter[str]]:
    """Every row with text in the columns that are named, and how many rows were left out, why.

    Raises:
        DataError: a row that cannot be read, or no row with text.
    """
    found: list[Row] = []
    dropped: Counter[str] = Counter()
    columns = [key for key in (keys.question, keys.good, keys.bad, keys.reference) if key is not None]
    for line, record in read_records(path, columns):
        if isinstance(record, BadRow):
            raise DataError(f"{record}. Mend the row, or take it out.")
        missing = [key for key in columns if key not in record]
        if missing:
            fix = "Name it by --prompt-key, --good-key, --bad-key or --reference-key"
            here = f"{path}:{line}: no column {missing[0]!r}; it has {', '.join(sorted(record))}"
            raise DataError(f"{here}. {fix}.")
        texts = {key: as_text(record[key]) for key in columns}
        question, good, bad, reference = (
            None if key is None else texts[key] for key in (keys.question, keys.good, keys.bad, keys.reference)
        )
        if not question or not good or "" in (bad, reference):
            dropped["blank"] += 1
        elif bad is not None and question_key(bad) in (question_key(good), question_key(reference or good)):
            dropped["equal"] += 1
        else:
            found.append(Row(question, good, bad, reference))
    if not found:
        raise DataError(f"{path}: no row with text in {', '.join(columns)}. Give other columns.")
    return found, dropped


def with_neighbours(rows: Sequence[Row]) -> list[str | None]:
    """For each row the good answer to the question that is most like its own; None where none is.

    Alike are questions by the Jaccard similarity of their sets of words, of equal ones the first. Compared are those
    that share one of the question's eight rarest words that any other has, or of its further ones until an answer
    differs. An answer of the same text, or with a reference answer of the same text, is no bad one.
    """
    sets = [set(words(row.question)) for row in rows]
    answers = [row.result for row in rows]
    index: dict[str, list[int]] = {}
    for place, one in enumerate(sets):
        for word in one:
            index.setdefault(word, []).append(place)
    found: list[str | None] = []
    for place, own in enumerate(tqdm(sets, desc="neighbours", unit="row", mininterval=1, dynamic_ncols=True)):
        alike: set[int] = set()
        shared = sorted((word for word in own if len(index[word]) > 1), key=lambda word: (len(index[word]), word))
        for number, word in enumerate(shared):
            if number >= RAREST_WORDS and alike:
                break
            alike |= {other for other in index[word] if answers[other] != answers[place]}
        best = max(alike, key=lambda other: (len(own & sets[other]) / len(own | sets[other]), -other), default=None)
        found.append(None if best is None else rows[best].good)
    return found


def wrong_samples(path: Path) -> dict[str, list[str]]:
    """Question -> the answers in a file of samples that are wrong: `correct` false, or `accuracy` 0.

    Raises:
        DataError: a row without question, answer and one of the two.
    """
    wrong: dict[str, list[str]] = {}
    for line, record in read_records(path, ("question", "answer", "correct", "accuracy")):
        if isinstance(record, BadRow):
            raise DataError(f"{record}. Mend the row, or take it out.")
        question, answer = as_text(record.get("question")), as_text(record.get("answer"))
        verdict = record.get("correct", record.get("accuracy"))
        if not question or not answer or not isinstance(verdict, (bool, int, float)):
            raise DataError(f"{path}:{line}: needs question, answer and correct (true, false). Mend the row.")
        if not verdict:
            wrong.setdefault(question_key(question), []).append(answer)
    return wrong


def pairs_of(path: Path, keys: PairKeys, bad_from: str | None) -> tuple[list[Judged], Counter[str]]:
    """The pairs of a file, and how many rows have none.

    Args:
        bad_from: `neighbour`, or a file of samples; None where the file has bad answers.
    Raises:
        ConfigError: bad answers from two places, or from none.
        DataError: see `read_pairs` and `wrong_samples`; or no pair.
    """
    if (keys.bad is None) == (bad_from is None):
        rule = "bad answers come from a column or from elsewhere, one of the two"
        fix = f"Add --bad-key KEY, or --bad-from {NEIGHBOUR}"
        raise ConfigError("--bad-key, --bad-from", [keys.bad, bad_from], rule, fix)
    rows, dropped = read_pairs(path, keys)
    if keys.bad is not None:
        bad = [row.bad for row in rows]
    elif bad_from == NEIGHBOUR:
        bad = with_neighbours(rows)
    else:
        wrong = wrong_samples(Path(str(bad_from)))
        bad = [_first_other(wrong.get(question_key(row.question), ()), row) for row in rows]
    found = zip(rows, bad, strict=True)
    pairs = [Judged(row.question, row.good, one, row.reference) for row, one in found if one is not None]
    dropped["no_bad_answer"] += len(rows) - len(pairs)
    if not pairs:
        raise DataError(f"{path}: no pair of a good and a bad answer. Give bad answers for its questions.")
    return pairs, dropped


def _first_other(answers: Sequence[str], row: Row) -> str | None:
    right = question_key(row.good), row.result
    return next((answer for answer in answers if question_key(answer) not in right), None)


def examples_of(pairs: Sequence[Judged], form: str, num_held_out: int) -> Splits:
    """Two rows a pair; the last pairs become the validation split.

    Raises:
        ConfigError: no pair would be left to train on.
    """
    if num_held_out >= len(pairs):
        rule = f"there are {len(pairs)} pairs"
        raise ConfigError("--held-out", num_held_out, rule, f"Ask for at most {len(pairs) - 1}")
    rows: Rows = []
    for number, pair in enumerate(pairs):
        for place, (prompt, answer) in enumerate(FORMS[form](pair)):
            example = Example(prompt, answer, None, JUDGE_PAIRS, f"pair/{number}/{place}", group=f"pair/{number}")
            rows.append((f"pair/{number}/{place}", example))
    cut = 2 * (len(pairs) - num_held_out)
    return {"train": rows[:cut]} | ({"validation": rows[cut:]} if num_held_out else {})
