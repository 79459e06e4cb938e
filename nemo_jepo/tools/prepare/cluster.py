"""Groups of questions: k-means by scikit-learn, on their words (TF-IDF) or on vectors of a model (--embed)."""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy
import pyarrow

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.tools.prepare.embed import embeddings, weight_files
from nemo_jepo.tools.prepare.records import Splits
from nemo_jepo.tools.prepare.steps import Account, Step, whole_number
from nemo_jepo.tools.prepare.text import words
from nemo_jepo.utils.files import sha256_of

SEED = 0
WORDS_SHOWN = 8
MOST_WORDS = 20_000
"""The vocabulary: the most frequent words."""


def clusters(
    questions: Sequence[str], count: int, vectors: numpy.ndarray | None = None
) -> tuple[list[int], list[list[str]]]:
    """The cluster of each question, and the words of each cluster that stand out most from all questions.

    Each question is the vector of (1 + log count) * inverse document frequency of its words, of length 1, or one that
    is given; k-means++ starts from SEED, and Lloyd's iterations end in a local optimum. One thread computes, because
    the order in which several add up their parts would decide ties. The same versions of scikit-learn and NumPy give
    the same.

    Args:
        count: clusters, numbered from 0; the largest is 0, the next 1, and so on.
        vectors: [N, h], what is compared in the place of words.
    Raises:
        ConfigError: there are fewer different questions than clusters.
    """
    from sklearn.cluster import KMeans  # seconds to import, and not installed everywhere
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.feature_extraction.text import TfidfVectorizer
    from threadpoolctl import threadpool_limits

    if count > len({" ".join(sorted(words(question))) for question in questions}):
        raise _too_many(count)
    by_words = TfidfVectorizer(analyzer=words, max_features=MOST_WORDS, sublinear_tf=True)
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)  # two different questions may have one vector
        try:
            table = by_words.fit_transform(questions)
            found = KMeans(count, n_init=1, random_state=SEED).fit(table if vectors is None else vectors)
        except ConvergenceWarning as error:
            raise _too_many(count) from error
    labels = found.labels_.tolist()
    order = [label for label, _ in sorted(Counter(labels).items(), key=lambda item: (-item[1], item[0]))]
    names, average = by_words.get_feature_names_out(), numpy.asarray(table.mean(axis=0)).ravel()
    own_average = [numpy.asarray(table[found.labels_ == label].mean(axis=0)).ravel() for label in order]
    standing_out = [names[(average - own).argsort(kind="stable")[:WORDS_SHOWN]].tolist() for own in own_average]
    return [order.index(label) for label in labels], standing_out


def _too_many(count: int) -> ConfigError:
    return ConfigError("--cluster", count, "more clusters than questions of different words", "Ask for fewer")


def cluster_step(value: str, embed: Path | None = None) -> Step:
    """--cluster K, --embed FOLDER: over the rows of all splits together.

    Raises:
        ConfigError: no whole number from 2, scikit-learn is not installed, no model in the folder; later, what
            `embeddings` and `clusters` raise.
    """
    count = whole_number("--cluster", value, least=2, example=20)
    if find_spec("sklearn") is None:
        fix = "pip install 'nemo_jepo[cluster]', or pip install scikit-learn"
        raise ConfigError("--cluster", value, "scikit-learn is not installed", fix)
    account: Account = {"seed": SEED}
    if embed is not None:
        account["model"] = {str(file): sha256_of(file) for file in weight_files(embed)}

    def apply(splits: Splits) -> tuple[Splits, Account]:
        questions = [example.question for rows in splits.values() for _, example in rows]
        vectors = None if embed is None else embeddings(questions, embed)
        labels, standing_out = clusters(questions, count, vectors)
        own = iter(labels)
        splits = {
            split: [(row_id, replace(example, cluster=next(own))) for row_id, example in rows]
            for split, rows in splits.items()
        }
        sizes = [labels.count(label) for label in range(count)]
        groups = [{"rows": rows, "words": " ".join(shown)} for rows, shown in zip(sizes, standing_out, strict=True)]
        says = f"{count} clusters of {min(sizes)} to {max(sizes)} rows"
        return splits, account | {"clusters": groups, "says": says}

    return Step("cluster", apply, column=pyarrow.field("cluster", pyarrow.int64(), nullable=False))
