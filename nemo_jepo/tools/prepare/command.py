"""The command line of `nemo-jepo data`."""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.data.files import Keys
from nemo_jepo.rewards.verifiable import verifiable_answers
from nemo_jepo.tools.prepare.cluster import cluster_step
from nemo_jepo.tools.prepare.decontaminate import decontaminate_step
from nemo_jepo.tools.prepare.difficulty import difficulty_step, keep_difficulty_step
from nemo_jepo.tools.prepare.duplicates import near_duplicates_step
from nemo_jepo.tools.prepare.judge_pairs import FORMS, JUDGE_PAIRS, NEIGHBOUR, PairKeys
from nemo_jepo.tools.prepare.origin import Origin
from nemo_jepo.tools.prepare.own import OWN
from nemo_jepo.tools.prepare.prepare import prepare, prepare_pairs
from nemo_jepo.tools.prepare.published import PUBLISHED
from nemo_jepo.tools.prepare.select_zip import select_step
from nemo_jepo.tools.prepare.steps import Step
from nemo_jepo.utils.exit_codes import DONE


def main(argv: Sequence[str]) -> int:
    """`nemo-jepo data`: prepare one data set and print its files. An interrupted one leaves nothing.

    Raises:
        ConfigError: arguments that do not go together, a folder that exists.
        DataError: data that cannot be reached, read or written.
    """
    chosen = _parser().parse_args(list(argv))
    if chosen.local and chosen.revision:
        raise ConfigError("--revision", chosen.revision, "a local copy has none", "Leave out --revision or --from")
    if chosen.name == JUDGE_PAIRS:
        folder = _pairs(chosen)
    else:
        _refuse(
            chosen, ("good_key", "bad_key", "bad_from", "reference_key", "form", "held_out"), f"is of {JUDGE_PAIRS}"
        )
        judge = partial(verifiable_answers, num_workers=chosen.workers)
        folder = prepare(chosen.name, chosen.out, judge, _origin(chosen), list(_steps(chosen)))
    manifest = json.loads((folder / "manifest.json").read_text())
    if "conditions" in manifest["source"]:
        print(manifest["source"]["conditions"], file=sys.stderr)
    for step in manifest.get("steps", ()):
        print(f"{step['step']}: {step['says']}")
    for file, counts in manifest["files"].items():
        print(f"{folder / file}  {counts['rows']} rows, {counts['verifiable']} verifiable")
    return DONE


def _pairs(chosen: argparse.Namespace) -> Path:
    """The folder of prompts that ask for judgements."""
    others = "revision", "answer_key", "chain_of_thought_key", "near_duplicates", "decontaminate", "ngram"
    _refuse(
        chosen, (*others, "difficulty", "keep_difficulty", "select", "cluster", "embed"), f"is not of {JUDGE_PAIRS}"
    )
    if chosen.local is None:
        raise ConfigError("--from", None, "the pairs are in a file", f"Add --from FILE to {JUDGE_PAIRS}")
    form = chosen.form or "verdict"
    if chosen.reference_key is not None and form != "graded":
        rule = f"the form {form} shows no reference answer"
        raise ConfigError("--reference-key", chosen.reference_key, rule, "Leave it out, or use --form graded")
    keys = PairKeys(chosen.prompt_key or "question", chosen.good_key or "answer", chosen.bad_key, chosen.reference_key)
    return prepare_pairs(chosen.out, chosen.local, keys, chosen.bad_from, form, chosen.held_out or 0)


def _refuse(chosen: argparse.Namespace, options: Sequence[str], rule: str) -> None:
    """Raise ConfigError where one of these options is given."""
    for option in options:
        if (value := getattr(chosen, option)) is not None:
            raise ConfigError(f"--{option.replace('_', '-')}", value, rule, "Leave it out")


def _origin(chosen: argparse.Namespace) -> Origin:
    """Where the rows come from; only a file of one's own has columns that the user names."""
    for option in ("prompt_key", "answer_key", "chain_of_thought_key"):
        if chosen.name != OWN and (key := getattr(chosen, option)) is not None:
            rule = f"{chosen.name} has columns of its own"
            raise ConfigError(f"--{option.replace('_', '-')}", key, rule, f"Leave it out, or prepare {OWN}")
    keys = Keys(chosen.prompt_key or "question", chosen.answer_key or "answer", chosen.chain_of_thought_key)
    return Origin(chosen.local, chosen.revision, keys)


def _steps(chosen: argparse.Namespace) -> Iterator[Step]:
    """The steps that are asked for, in the order of their application."""
    for option, needed in (("ngram", "decontaminate"), ("keep_difficulty", "difficulty"), ("embed", "cluster")):
        if (value := getattr(chosen, option)) and not getattr(chosen, needed):
            key = f"--{option.replace('_', '-')}"
            raise ConfigError(key, str(value), f"has no --{needed} to act on", f"Add --{needed}, or drop it")
    if chosen.near_duplicates is not None:
        yield near_duplicates_step(chosen.near_duplicates)
    if chosen.decontaminate is not None:
        yield decontaminate_step(chosen.decontaminate, chosen.ngram or "9", chosen.out)
    if chosen.difficulty is not None:
        yield difficulty_step(chosen.difficulty)
    if chosen.keep_difficulty is not None:
        yield keep_difficulty_step(chosen.keep_difficulty)
    if chosen.select is not None:
        yield select_step(chosen.select)
    if chosen.cluster is not None:
        yield cluster_step(chosen.cluster, chosen.embed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nemo-jepo data", allow_abbrev=False)
    commands = parser.add_subparsers(metavar="prepare", required=True)
    command = commands.add_parser(
        "prepare", help="write a published data set, or your own, as Parquet with a manifest", allow_abbrev=False
    )
    command.add_argument("name", metavar="NAME", help=f"{', '.join(PUBLISHED)}; of your file: {OWN}, {JUDGE_PAIRS}")
    command.add_argument("--out", type=Path, default=Path("data"), help="folder that gets the folder NAME (data)")
    command.add_argument("--from", dest="local", type=Path, metavar="PATH", help="a local copy: file or folder")
    command.add_argument("--revision", help="another revision than the pinned one")
    cpus = len(os.sched_getaffinity(0))
    command.add_argument("--workers", type=_count, default=cpus, help="verifier processes; default: one for each CPU")

    pairs = command.add_argument_group(f"pairs of answers to judge (NAME is {JUDGE_PAIRS}; --from, --prompt-key)")
    pairs.add_argument("--good-key", metavar="KEY", help="the good answer (answer)")
    pairs.add_argument("--bad-key", metavar="KEY", help="the bad answer, where the file has one")
    pairs.add_argument("--bad-from", metavar=f"{NEIGHBOUR}|FILE", help="else: of the question most like it, or samples")
    pairs.add_argument("--reference-key", metavar="KEY", help="form graded: the reference answer (the good answer)")
    pairs.add_argument("--form", choices=tuple(FORMS), help="of a judgement (verdict)")
    pairs.add_argument("--held-out", type=_count, metavar="N", help="pairs that become the validation split (none)")

    own = command.add_argument_group(f"columns of a file of your own (NAME is {OWN})")
    own.add_argument("--prompt-key", metavar="KEY", help="the question (question)")
    own.add_argument("--answer-key", metavar="KEY", help="the reference answer (answer)")
    own.add_argument("--chain-of-thought-key", metavar="KEY", help="a golden chain of thought (none)")

    steps = command.add_argument_group("what else is done, in this order; rows are dropped of the training split alone")
    steps.add_argument("--near-duplicates", metavar="J", help="drop rows like an earlier one: Jaccard similarity, 0.8")
    steps.add_argument(
        "--decontaminate",
        metavar="SET[,SET]",
        help="drop rows that share an n-gram with a set to evaluate on: a file, a folder, a NAME prepared below --out",
    )
    steps.add_argument("--ngram", metavar="N", help="words of an n-gram (9)")
    steps.add_argument("--difficulty", metavar="FILE", type=Path, help="add a column from pass rates by id or question")
    steps.add_argument("--keep-difficulty", metavar="LOW:HIGH", help="keep rows of this difficulty; 1 is never solved")
    steps.add_argument("--select", metavar="zip:N", help="keep the N rows that compress least together")
    steps.add_argument("--cluster", metavar="K", help="add a column: one of K groups of questions with the same words")
    steps.add_argument("--embed", metavar="FOLDER", type=Path, help="of like vectors instead: a Hugging Face model")
    return parser


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return count
