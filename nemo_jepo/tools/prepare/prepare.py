"""Rows -> examples -> filters -> held-out split -> steps -> verifiable flags -> Parquet and manifest, all or nothing.

`nemo_jepo.tools.prepare.steps` says what a step is; without one nothing of it shows in the files.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from tqdm import tqdm

from nemo_jepo.config.errors import ConfigError, DataError
from nemo_jepo.tools.prepare.judge_pairs import JUDGE_PAIRS, NEIGHBOUR, PairKeys, examples_of, pairs_of
from nemo_jepo.tools.prepare.origin import Origin, local_files, published_files, read_split
from nemo_jepo.tools.prepare.own import OWN, own_file
from nemo_jepo.tools.prepare.published import PUBLISHED
from nemo_jepo.tools.prepare.records import FILTERS, Example, Published, Rows, Splits
from nemo_jepo.tools.prepare.steps import Step, run
from nemo_jepo.tools.prepare.text import question_key
from nemo_jepo.utils.files import sha256_of

Judge = Callable[[Sequence[str]], Sequence[bool | None]]
"""Answers -> whether the verifier can grade each; None after a fault of the verifier."""

SCHEMA = pyarrow.schema(
    [
        pyarrow.field("question", pyarrow.string(), nullable=False),
        pyarrow.field("answer", pyarrow.string(), nullable=False),
        pyarrow.field("chain_of_thought", pyarrow.string()),
        pyarrow.field("verifiable", pyarrow.bool_(), nullable=False),
        pyarrow.field("id", pyarrow.string(), nullable=False),
        pyarrow.field("source", pyarrow.string(), nullable=False),
    ]
)


@dataclass(slots=True)
class Kept:
    """What the filters left of one published split."""

    num_read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Filter -> rows."""
    examples: Rows = field(default_factory=list)


def prepare(name: str, out: Path, judge: Judge, origin: Origin, steps: Sequence[Step] = ()) -> Path:
    """Write <out>/<name>: a Parquet file for each split, and manifest.json. The folder appears whole or not at all.

    Args:
        judge: asked once, about every answer; see `nemo_jepo.rewards.verifiable`.
        origin: of the rows.
        steps: what else drops rows or adds columns, in this order.
    Returns:
        The new folder.
    Raises:
        ConfigError: no such data set, the folder exists, or a step that drops rows without a training split.
        DataError: what cannot be read or written, or no row is left.
    """
    if name not in (*PUBLISHED, OWN):
        raise ConfigError("NAME", name, "no such data set", f"Choose one of {', '.join((*PUBLISHED, OWN))}")
    published, target = own_file(origin) if name == OWN else PUBLISHED[name], out / name
    for step in steps:
        if step.drops and "train" not in published.files:
            rule = "drops training rows, and this set has none"
            raise ConfigError("NAME", name, f"{step.option} {rule}", f"Leave out {step.option}")
    if target.exists():
        raise ConfigError("--out", str(out), f"{target} exists", "Remove it, or choose another folder")
    local, revision = origin.local, origin.revision
    files = local_files(published, local) if local else published_files(published, revision)
    source: dict[str, Any] = {"home": published.home, "licence": published.licence}
    if published.conditions:
        source["conditions"] = published.conditions
    if local:
        source |= {"local_copy": {path: sha256_of(path) for paths in files.values() for path in paths}}
    else:
        source |= {"revision": revision or published.revision, "files": files}

    splits = {split: keep(published, split, paths, local is not None) for split, paths in files.items()}
    examples = {split: kept.examples for split, kept in splits.items()}
    examples, first = run([step for step in steps if step.before_hold_out], examples)
    examples = held_out(examples, published.held_out)
    examples, then = run([step for step in steps if not step.before_hold_out], examples)
    answers = [example.answer for rows in examples.values() for _, example in rows]
    flags = iter(judge(answers) if published.verified else [False] * len(answers))
    flagged = {split: (rows, [next(flags) for _ in rows]) for split, rows in examples.items()}
    manifest = {"name": name, "source": source} | _counts(published, splits, examples)
    if steps:
        manifest["steps"] = first + then
    return _write(target, flagged, manifest, [step.column for step in steps if step.column is not None])


def prepare_pairs(out: Path, path: Path, keys: PairKeys, bad_from: str | None, form: str, num_held_out: int) -> Path:
    """Write <out>/judge_pairs: prompts that ask for judgements of the pairs in a file, and manifest.json.

    Args:
        path, keys, bad_from: the pairs; see `nemo_jepo.tools.prepare.judge_pairs`.
        form: of the judgements.
        num_held_out: pairs that become the validation split.
    Returns:
        The new folder.
    Raises:
        ConfigError, DataError: what cannot be read, used or written.
    """
    target = out / JUDGE_PAIRS
    if target.exists():
        raise ConfigError("--out", str(out), f"{target} exists", "Remove it, or choose another folder")
    pairs, dropped = pairs_of(path, keys, bad_from)
    splits = examples_of(pairs, form, num_held_out)
    files = [path] if bad_from in (None, NEIGHBOUR) else [path, Path(str(bad_from))]
    manifest = {
        "name": JUDGE_PAIRS,
        "source": {"local_copy": {str(file): sha256_of(file) for file in files}},
        "form": form,
        "bad_answers": bad_from or f"column {keys.bad}",
        "pairs": len(pairs),
        "rows_without_a_pair": dict(dropped),
    }
    flagged: dict[str, tuple[Rows, list[bool | None]]] = {}
    for split, rows in splits.items():
        flagged[split] = rows, [True] * len(rows)
    return _write(target, flagged, manifest, [pyarrow.field("group", pyarrow.string(), nullable=False)])


def keep(published: Published, split: str, files: list[str], is_local: bool) -> Kept:
    """The examples of one published split."""
    kept, seen = Kept(), set()
    rows = read_split(published, files, is_local)
    for row in tqdm(rows, desc=f"read {split}", unit="row", mininterval=1, dynamic_ncols=True):
        example = published.read(row)
        if isinstance(example, Example) and "repeated" in published.filters:
            question = hashlib.sha256(question_key(example.question).encode()).digest()
            if question in seen:
                example = "repeated"
            seen.add(question)
        if isinstance(example, Example):
            kept.examples.append((example.id or f"{split}/{kept.num_read}", example))
        else:
            kept.dropped[example] += 1
        kept.num_read += 1
    if not kept.examples:
        raise DataError(f"{files[0]}: of {kept.num_read} rows none is left ({dict(kept.dropped)}). Give other rows.")
    return kept


def held_out(splits: Splits, most: int) -> Splits:
    """The splits, with a tenth of the training rows, but no more than `most`, as the validation split.

    The digest of its question decides whether a row is held out: the order and the other rows do not.
    """
    if not most:
        return splits
    rows = splits["train"]
    if len(rows) < 2:
        raise DataError("1 usable row: at least 2 are needed to hold one out. Give more rows.")
    by_digest = sorted(rows, key=lambda row: hashlib.sha256(row[1].question.encode()).digest())
    ids = {row_id for row_id, _ in by_digest[: min(most, -(-len(rows) // 10))]}
    return {
        "train": [row for row in rows if row[0] not in ids],
        "validation": [row for row in rows if row[0] in ids],
    }


def _counts(published: Published, splits: dict[str, Kept], examples: Splits) -> dict[str, Any]:
    """The manifest's account of rows: before and after each filter, and beside the paper's."""
    filters: dict[str, list[dict[str, Any]]] = {}
    for split, kept in splits.items():
        rows, filters[split] = kept.num_read, []
        for name in published.filters:
            after = rows - kept.dropped[name]
            filters[split].append({"filter": name, "drops": FILTERS[name], "rows_before": rows, "rows_after": after})
            rows = after
    paper: dict[str, Any] = {"says": published.paper}
    if published.paper_count is not None:
        prepared = sum(map(len, examples.values()))
        difference = prepared - published.paper_count
        paper |= {"count": published.paper_count, "prepared": prepared, "difference": difference}
    return {"filters": filters} | ({"paper": paper} if published.paper else {})


def _write(
    target: Path,
    splits: dict[str, tuple[Rows, list[bool | None]]],
    manifest: dict[str, Any],
    columns: Sequence[pyarrow.Field],
) -> Path:
    """The folder, under a temporary name until it is whole.

    Args:
        columns: beside those of `SCHEMA`; each has the name of an example's field.
    """
    unfinished, schema = None, pyarrow.schema([*SCHEMA, *columns])
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}.unfinished-", dir=target.parent))
        unfinished.chmod(0o755)
        written = {}
        for split, (rows, flags) in splits.items():
            file = unfinished / f"{split}.parquet"
            pyarrow.parquet.write_table(_table(rows, flags, schema), file, compression="zstd", write_page_checksum=True)
            counts = {"rows": len(rows), "verifiable": flags.count(True), "verifier_faults": flags.count(None)}
            written[file.name] = counts | {"sha256": sha256_of(file)}
        manifest = manifest | {
            "files": written,
            "columns": schema.names,
            "prepared_by": f"nemo_jepo {version('nemo_jepo')}",
        }
        (unfinished / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        unfinished.rename(target)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise DataError(f"{target}: cannot be written ({why}). Make room, or choose another folder.") from error
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
    return target


def _table(rows: Rows, flags: Sequence[bool | None], schema: pyarrow.Schema) -> pyarrow.Table:
    columns: dict[str, list[Any]] = {"verifiable": [bool(flag) for flag in flags], "id": [row_id for row_id, _ in rows]}
    for name in schema.names:
        if name not in columns:
            columns[name] = [getattr(example, name) for _, example in rows]
    return pyarrow.table(columns, schema=schema)
