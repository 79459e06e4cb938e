"""When two questions say the same: the words of a text, its n-grams, its key. Everything that compares uses these."""

import re
import unicodedata

WORD = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    r"""The runs of letters and digits, casefolded; whatever stands between them is punctuation.

    Numbers stay, signs and operators do not: "Is $x^{2}-1 = 0$?" -> is x 2 1 0. Characters that Unicode calls
    compatible are one (NFKC): full-width digits, ligatures.
    """
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def ngrams(text: str, n: int) -> set[str]:
    """The distinct n-grams of the words, each as its words with a blank between.

    A text of fewer than n words has one, the whole of it; a text without words has none.
    """
    found = words(text)
    if not found:
        return set()
    return {" ".join(found[first : first + n]) for first in range(max(1, len(found) - n + 1))}


def question_key(question: str) -> str:
    """The question as `repeated` and `--difficulty` compare it: case and white space do not count."""
    return " ".join(question.split()).casefold()
