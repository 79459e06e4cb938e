"""Training questions that share words with an evaluation question, found and dropped."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from nemo_jepo.config.errors import ConfigError, DataError
from nemo_jepo.data.files import BadRow, Keys, read_rows
from nemo_jepo.tools.prepare.records import Splits
from nemo_jepo.tools.prepare.steps import Account, Step, dropped, whole_number
from nemo_jepo.tools.prepare.text import ngrams
from nemo_jepo.utils.files import sha256_of

OPTION = "--decontaminate"
SUFFIXES = (".parquet", ".jsonl")


@dataclass(frozen=True, slots=True)
class EvaluationFile:
    """Questions that no training question may resemble."""

    name: str
    """The set as the user names it, with the file's name where the set is a folder."""
    questions: tuple[str, ...]
    sha256: str


def contaminations(questions: Sequence[str], evaluations: Sequence[Sequence[str]], n: int) -> list[list[int]]:
    """For each question the numbers of the evaluation sets of which a question has an n-gram in common with it.

    N-grams are of words (`text.ngrams`): a question of fewer than n words is one as a whole, so it equals another
    whole question alone, and never a part of a longer one.

    Source: arXiv 2505.16400 (AceReason-Nemotron), which filters its mathematics by 9-grams; what a word is, is ours.
    """
    sets_of: dict[str, set[int]] = {}
    for number, evaluation in enumerate(evaluations):
        for question in evaluation:
            for ngram in ngrams(question, n):
                sets_of.setdefault(ngram, set()).add(number)
    shown = tqdm(questions, desc="decontaminate", unit="row", mininterval=1, dynamic_ncols=True)
    return [sorted(set().union(*(sets_of.get(ngram, ()) for ngram in ngrams(question, n)))) for question in shown]


def evaluation_files(wanted: str, out: Path) -> Iterator[EvaluationFile]:
    """The files of the sets in a list with commas: paths, or names of sets that were prepared below `out`.

    Of a folder every .parquet and .jsonl file counts but those whose names begin with train.

    Raises:
        ConfigError: no such path and no such prepared set, or a folder without such files.
        DataError: a file without a question, a row without one, or what cannot be read.
    """
    for name in wanted.split(","):
        place = Path(name) if name and Path(name).exists() else out / name
        if not name or not place.exists():
            fix = f"Give a path, or prepare it first: nemo-jepo data prepare {name or 'math500'} --out {out}"
            raise ConfigError(OPTION, wanted, f"{name!r} is no file or folder, nor is {place}", fix)
        files = [place]
        if place.is_dir():
            files = [file for file in sorted(place.iterdir()) if file.suffix in SUFFIXES]
            files = [file for file in files if not file.name.startswith("train")]
        if not files:
            rule = f"{place} holds no file of an evaluation split"
            raise ConfigError(OPTION, wanted, rule, "Give a folder with test.parquet or test.jsonl, or a file")
        for file in files:
            rows = list(read_rows(file, Keys("question", "question")))
            for row in rows:
                if isinstance(row, BadRow):
                    raise DataError(f"{row}. Mend the row, or take it out.")
            if not rows:
                raise DataError(f"{file}: no row. Give a file with questions.")
            questions = tuple(row.question for row in rows if not isinstance(row, BadRow))
            yield EvaluationFile(name if file == place else f"{name}/{file.name}", questions, sha256_of(file))


def decontaminate_step(wanted: str, ngram: str, out: Path) -> Step:
    """--decontaminate SET_OR_FILE[,...] with --ngram N. Errors: see `evaluation_files`, and an N that is no number."""
    n = whole_number("--ngram", ngram, least=1, example=9)
    files = list(evaluation_files(wanted, out))

    def apply(splits: Splits) -> tuple[Splits, Account]:
        questions = [example.question for _, example in splits["train"]]
        found = contaminations(questions, [file.questions for file in files], n)
        sets = [
            {
                "set": file.name,
                "questions": len(file.questions),
                "sha256": file.sha256,
                "training_rows_that_share": sum(number in hits for hits in found),
            }
            for number, file in enumerate(files)
        ]
        shares = ", ".join(f"{entry['training_rows_that_share']} for {entry['set']}" for entry in sets)
        return dropped(splits, [not hits for hits in found], {"ngram": n, "sets": sets}, f" ({shares})")

    return Step("decontaminate", apply, drops=True)
