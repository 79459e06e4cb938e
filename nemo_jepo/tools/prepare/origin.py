"""Where the rows come from: the published files at their revision, or a local copy. Both through `datasets`."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from nemo_jepo.config.errors import ConfigError, DataError
from nemo_jepo.data.files import Keys
from nemo_jepo.tools.prepare.records import Published, Row

FORMATS = {".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
SPLIT_NAMES = {"train": "train", "test": "test", "valid": "validation", "validation": "validation"}


@dataclass(frozen=True, slots=True)
class Origin:
    """Which files to read: the published ones at the pinned revision, unless it says otherwise."""

    local: Path | None = None
    """A local copy."""
    revision: str | None = None
    keys: Keys | None = None
    """The columns of a file of one's own."""


def published_files(published: Published, revision: str | None = None) -> dict[str, list[str]]:
    """Split -> addresses at the pinned revision, or at another one."""
    wanted = revision or published.revision
    return {split: [address.format(revision=wanted)] for split, address in published.files.items()}


def local_files(published: Published, path: Path) -> dict[str, list[str]]:
    """Split -> paths of a local copy.

    A folder is searched, also inside, for .jsonl, .parquet and .csv files whose names begin with the split:
    train.jsonl, algebra/train-00000-of-00001.parquet, valid.jsonl. A file is the split of a data set that has one.

    Raises:
        ConfigError: no such path, or a split without a file.
    """
    if not path.exists():
        raise ConfigError("--from", str(path), "no such file or folder", "Give a local copy of the data set")
    if path.is_file() and len(published.files) == 1 and path.suffix in FORMATS:
        return {split: [str(path)] for split in published.files}
    found: dict[str, list[str]] = {split: [] for split in published.files}
    for file in sorted(path.rglob("*") if path.is_dir() else [path]):
        split = SPLIT_NAMES.get(re.split(r"[-_.]", file.name)[0])
        if file.suffix in FORMATS and split in found:
            found[split].append(str(file))
    for split, files in found.items():
        if not files:
            rule = f"holds no file of the {split} split"
            raise ConfigError("--from", str(path), rule, f"Name it {split}.jsonl or {split}.parquet")
    return found


def read_split(published: Published, files: list[str], is_local: bool) -> Iterator[Row]:
    """The rows of one split, in the order of its files. Published files are kept in the cache of `datasets`.

    Raises:
        DataError: a file that cannot be reached or read (at once, or at a later row), or a missing column.
    """
    import datasets  # seconds to import

    formats = {FORMATS[Path(file).suffix] for file in files}
    if len(formats) > 1:
        raise DataError(f"{files[0]}: its split is there in several formats. Leave one of them.")
    with _library_errors(files, is_local):
        rows = iter(datasets.load_dataset(formats.pop(), data_files=files, split="train", streaming=is_local))
        first = next(rows, None)
    if first is None:
        raise DataError(f"{files[0]}: no row. Give a file with rows.")
    missing = [column for column in published.columns if column not in first]
    if missing:
        raise DataError(
            f"{files[0]}: no column {', '.join(map(repr, missing))}; it has {', '.join(sorted(first))}. "
            f"{published.remedy or f'Give a file with the columns of {published.home}'}."
        )
    return _with_library_errors(chain([first], rows), files, is_local)


def _with_library_errors(rows: Iterator[Row], files: list[str], is_local: bool) -> Iterator[Row]:
    with _library_errors(files, is_local):
        yield from rows


@contextmanager
def _library_errors(files: list[str], is_local: bool) -> Iterator[None]:
    """Turn whatever goes wrong inside into one line: the libraries of the network and the formats raise their own."""
    try:
        yield
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        fix = "Mend the file" if is_local else "Reach the network, or give a local copy with --from PATH"
        raise DataError(f"{files[0]}: cannot be read ({why}). {fix}.") from error
