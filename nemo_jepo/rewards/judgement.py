"""Judgements of answers, read from what a policy writes behind the marker (data.verifier=judgement).

    form        own answer                 right where                                reference answer of a prompt
    verdict     A, B, [[A]] or [[B]]       it names the better answer                 A or B
    scores      A: 7.5, B: 3               the better answer has the higher score     A or B
    score       7.5                        nobody can say: see below                  good or bad
    graded      correct or wrong           it says what the answer is                 correct or wrong

Scores are from 0 to 10 with at most one decimal. Two prompts of one pair stand beside each other (data.group_key), and
sample i of the one is held against sample i of the other:

    verdict, scores, graded    both earn 1 if both are right, else 0: a judge that always says A earns nothing
    score                      both earn 1 if the good answer has the higher score, else 0

A judgement that cannot be read is no verdict, and so is a right one whose partner cannot be read: neither 0 nor 1. A
sample without an answer is wrong.

Source: arXiv 2505.10320 (J1): both orders of a pair in one batch, a reward for consistent verdicts, pointwise scores
from pairs. There a text that cannot be read has score 0.
"""

import re
from collections.abc import Mapping, Sequence

from nemo_jepo.types import Prompt

NUMBER = r"(\d{1,2}(?:\.\d)?)(?:\s*/\s*10)?"
VERDICT = re.compile(r"\[\[\s*([AB])\s*\]\]|\(?([AB])\)?")
SCORES = re.compile(rf"A\s*[:=]\s*{NUMBER}\s*[,;]?\s*B\s*[:=]\s*{NUMBER}")
SCORE = re.compile(NUMBER)
LARGEST_SCORE = 10.0


def is_right(own: str, reference: str) -> bool | None:
    """Whether one judgement is right; None where it cannot be read, or is a score that only a partner can place."""
    text = _read(own)
    if reference in ("A", "B"):
        if named := VERDICT.fullmatch(text):
            return (named[1] or named[2]) == reference
        if scores := SCORES.fullmatch(text):
            of_a, of_b = float(scores[1]), float(scores[2])
            if max(of_a, of_b) > LARGEST_SCORE:
                return None
            return of_a > of_b if reference == "A" else of_b > of_a
        return None
    if reference in ("correct", "wrong"):
        word = text.casefold()
        return word == reference if word in ("correct", "wrong") else None
    return None


def score(own: str) -> float | None:
    """The one score that a judgement gives; None where it gives none from 0 to 10."""
    found = SCORE.fullmatch(_read(own))
    value = None if found is None else float(found[1])
    return None if value is None or value > LARGEST_SCORE else value


def can_be_read(own: str, reference: str) -> bool:
    """Whether a judgement has the form that its prompt asks for."""
    return (score(own) if reference in ("good", "bad") else is_right(own, reference)) is not None


def consistent(mine: str | None, partners: str | None, reference: str, partners_reference: str) -> bool | None:
    """Whether two judgements of a pair are right together, from the side of the first; None where nobody can tell.

    Args:
        mine, partners: own answers; None or blank without one, which is wrong.
        reference, partners_reference: what is right.
    """
    if not _is_there(mine) or not _is_there(partners):
        return False
    assert mine is not None and partners is not None
    if reference in ("good", "bad"):
        of_mine, of_partner = score(mine), score(partners)
        if of_mine is None or of_partner is None or {reference, partners_reference} != {"good", "bad"}:
            return None
        return of_mine > of_partner if reference == "good" else of_partner > of_mine
    own = is_right(mine, reference)
    return is_right(partners, partners_reference) if own else own


def partner_of(prompts: Sequence[Prompt]) -> list[int]:
    """The place of each prompt's partner.

    Raises:
        ValueError: a prompt whose group has another number of prompts than two here.
    """
    places: dict[tuple[str | None, int], list[int]] = {}
    for place, prompt in enumerate(prompts):
        places.setdefault((prompt.group_key, prompt.occurrence), []).append(place)
    partners = dict[int, int]()
    for (key, _), members in places.items():
        if key is None or len(members) != 2:
            raise ValueError(f"group {key!r} has {len(members)} prompts in a batch: a pair of judgements has two")
        partners |= {members[0]: members[1], members[1]: members[0]}
    return [partners[place] for place in range(len(prompts))]


def pair_rewards(
    prompts: Sequence[Prompt], answers: Mapping[tuple[int, int], str | None]
) -> dict[tuple[int, int], float | None]:
    """What each sample's judgement earns with its partner's.

    Args:
        prompts: P, each pair whole.
        answers: (prompt, sample) -> own answer, None without one.
    Returns:
        (prompt, sample) -> 1, 0 or None, for every sample that is given.
    """
    partners = partner_of(prompts)
    rewards: dict[tuple[int, int], float | None] = {}
    for (place, sample), mine in answers.items():
        other = partners[place]
        if (other, sample) not in answers:  # it never arrived
            rewards[place, sample] = None
            continue
        references = prompts[place].answer.strip(), prompts[other].answer.strip()
        verdict = consistent(mine, answers[other, sample], *references)
        rewards[place, sample] = None if verdict is None else float(verdict)
    return rewards


class JudgementVerifier:
    """What an evaluation asks of one judgement by itself; it has no process."""

    def is_right(self, own: str, prompt: Prompt) -> bool | None:
        """Whether the judgement is right; None where it cannot be read. See the module."""
        return is_right(own, prompt.answer.strip())


def _is_there(own: str | None) -> bool:
    return own is not None and bool(own.strip())


def _read(own: str) -> str:
    """The judgement without what people write around one."""
    return own.strip(" \n\t*`.")
