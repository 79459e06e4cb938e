"""Published rows -> prepared files: what is kept, what is counted, and that the data loader reads them."""

import hashlib
import json
from pathlib import Path

import pyarrow.parquet
import pytest

from nemo_jepo.config.errors import ConfigError, DataError
from nemo_jepo.config.schema import AnswerConfig, DataConfig
from nemo_jepo.data.dataset import load_prompts
from nemo_jepo.tools.prepare.benchmarks import gpqa
from nemo_jepo.tools.prepare.origin import Origin, published_files
from nemo_jepo.tools.prepare.prepare import prepare
from nemo_jepo.tools.prepare.published import PUBLISHED
from nemo_jepo.tools.prepare.records import FILTERS
from tests.support.published_rows import (
    AIME24,
    AIME25,
    GPQA,
    GSM8K,
    MATH,
    MATH500,
    MINERVA,
    MINIF2F,
    NUMINA,
    NUMINA_PROOF,
    OLYMPIADBENCH,
    PROOFNET,
    numbered,
    write,
)

REAL = Path(__file__).parents[4] / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the data files are not beside the checkout")


def only_short(answers):
    """In the place of the verifier: short answers can be graded, the word fault is one."""
    return [None if answer == "fault" else len(answer) < 12 for answer in answers]


def never(answers):
    raise AssertionError("proofs are not shown to the verifier")


def prepared(name, out, local, judge=only_short):
    """(split -> rows, manifest) of a data set prepared from local files."""
    folder = prepare(name, out, judge, Origin(local))
    assert folder == out / name
    rows = {path.stem: pyarrow.parquet.read_table(path).to_pylist() for path in folder.glob("*.parquet")}
    return rows, json.loads((folder / "manifest.json").read_text())


def steps(manifest, split="train"):
    return {step["filter"]: (step["rows_before"], step["rows_after"]) for step in manifest["filters"][split]}


def test_math_is_question_boxed_answer_and_solution(tmp_path):
    write(tmp_path / "MATH" / "algebra" / "train-00000-of-00001.parquet", MATH, MATH | {"solution": "It is 5/6."})
    write(tmp_path / "MATH" / "geometry" / "train-00000-of-00001.parquet", MATH | {"type": "Geometry"})
    write(tmp_path / "MATH" / "geometry" / "test-00000-of-00001.parquet", MATH | {"solution": r"\boxed{fault}"})
    rows, manifest = prepared("math", tmp_path / "out", tmp_path / "MATH")
    first = {"question": MATH["problem"], "answer": r"\frac{5}{6}", "chain_of_thought": MATH["solution"]}
    assert rows["train"] == [
        first | {"verifiable": True, "id": "train/0", "source": "Prealgebra"},
        first | {"verifiable": True, "id": "train/2", "source": "Geometry"},
    ]
    assert rows["test"][0]["verifiable"] is False
    assert steps(manifest) == {"blank": (3, 3), "no_box": (3, 2)}
    assert manifest["files"]["test.parquet"]["verifier_faults"] == 1


def test_gsm8k_is_question_number_and_solution(tmp_path):
    write(tmp_path / "train.jsonl", GSM8K, GSM8K | {"answer": "24 clips"}, GSM8K | {"question": None})
    write(tmp_path / "test.jsonl", GSM8K)
    rows, manifest = prepared("gsm8k", tmp_path / "out", tmp_path)
    (row,) = rows["train"]
    assert (row["question"], row["answer"]) == ("How many clips?", "1200")
    assert row["chain_of_thought"] == "He sold 48/2 = 24.\nTogether 1,200."
    assert steps(manifest) == {"blank": (3, 2), "no_final_answer": (2, 1)}


def test_proofnet_is_statement_and_proof_and_never_verifiable(tmp_path):
    write(tmp_path / "valid.jsonl", PROOFNET, PROOFNET | {"nl_proof": ""})
    write(tmp_path / "test.jsonl", PROOFNET)
    rows, _ = prepared("proofnet", tmp_path / "out", tmp_path, judge=never)
    assert rows["validation"] == rows["test"]
    assert rows["test"] == [
        {
            "question": PROOFNET["nl_statement"],
            "answer": "If $r$ and $r+x$ were both rational, so would $x=r+x-r$ be.",
            "chain_of_thought": None,
            "verifiable": False,
            "id": "Rudin|exercise_1_1a",
            "source": "Rudin",
        }
    ]


def test_numina_counts_what_each_filter_drops_and_flags_the_rest(tmp_path):
    dropped = [
        NUMINA | {"answer": None},
        NUMINA_PROOF,
        NUMINA | {"answer": "Proof"},
        NUMINA | {"problem_is_valid": "Incomplete"},
        NUMINA | {"solution_is_valid": "No"},
        NUMINA | {"answer": "notfound"},
        NUMINA | {"solution": "## Solution."},
        NUMINA | {"problem": "Find ALL real  $x$ with $x^2 = 4$."},
    ]
    text = NUMINA | {"problem": "Who wins?", "answer": "Alice, if $n$ is odd"}
    path = write(tmp_path / "numina.parquet", NUMINA, text, *dropped)
    rows, manifest = prepared("numina", tmp_path / "out", path)
    assert list(steps(manifest).values()) == [(10, 9), (9, 7), (7, 5), (5, 4), (4, 3), (3, 2)]
    assert list(steps(manifest)) == list(PUBLISHED["numina"].filters)
    both = {row["question"]: row for split in rows.values() for row in split}
    assert set(both) == {"Find all real $x$ with $x^2 = 4$", "Who wins?"}
    assert both["Find all real $x$ with $x^2 = 4$"] == {
        "question": "Find all real $x$ with $x^2 = 4$",
        "answer": r"\{-2, 2\}",
        "chain_of_thought": "Taking roots, $x=2$ or $x=-2$",
        "verifiable": True,
        "id": "train/0",
        "source": "olympiads",
    }
    assert both["Who wins?"]["verifiable"] is False


def test_numina_proof_keeps_cleaned_proofs_and_compares_its_count_with_the_papers(tmp_path):
    also = NUMINA_PROOF | {"problem": "Show it.", "question_type": "other"}  # the answer alone says proof
    rows, manifest = prepared(
        "numina_proof", tmp_path / "out", write(tmp_path / "p.jsonl", NUMINA, NUMINA_PROOF, also), judge=never
    )
    both = {row["id"]: row for split in rows.values() for row in split}
    assert both["train/1"] == {
        "question": "Let $n$ be even. Prove that $n^2$ is even",
        "answer": "With $n=2k$ we have $n^2=2(2k^2)$",
        "chain_of_thought": None,
        "verifiable": False,
        "id": "train/1",
        "source": "olympiads_ref",
    }
    assert both["train/2"]["question"] == "Show it"
    assert steps(manifest)["not_a_proof"] == (3, 2)
    paper = manifest["paper"]
    assert (paper["count"], paper["prepared"], paper["difference"]) == (58088, 2, -58086)


BY_HAND = OLYMPIADBENCH["solution"][0]


@pytest.mark.parametrize(
    ("name", "file", "row", "question", "answer", "chain_of_thought", "source", "row_id"),
    [
        ("math500", "a.jsonl", MATH500, "What is $1+1$?", "2", MATH500["solution"], "Algebra", "test/algebra/1.json"),
        ("aime24", "a.parquet", AIME24, "Find it.", "33", None, "aime", "test/0"),
        ("aime25", "a.jsonl", AIME25, "Find it.", "70", None, "aime", "test/0"),
        ("minerva", "a.jsonl", MINERVA, "How many watts?", "4.5e33", None, "minerva", "test/0"),
        (
            "olympiadbench",
            "a.parquet",
            OLYMPIADBENCH,
            "Find all $x$.",
            "1, 2",
            "By hand, $x=1$ or $x=2$.",
            "Algebra",
            "test/0",
        ),
    ],
)
def test_a_benchmark_is_its_test_split_with_short_answers(
    tmp_path, name, file, row, question, answer, chain_of_thought, source, row_id
):
    blank = {column: [] if isinstance(value, list) else None for column, value in row.items()}
    rows, manifest = prepared(name, tmp_path / "out", write(tmp_path / file, row, blank))
    expected = {"question": question, "answer": answer, "chain_of_thought": chain_of_thought, "source": source}
    assert rows == {"test": [expected | {"verifiable": True, "id": row_id}]}
    assert steps(manifest, "test")["blank"] == (2, 1)


def test_an_aime_answer_is_a_whole_number(tmp_path):
    rows, manifest = prepared("aime25", tmp_path / "out", write(tmp_path / "a.jsonl", AIME25, AIME25 | {"answer": "?"}))
    assert len(rows["test"]) == 1 and steps(manifest, "test") == {"blank": (2, 2), "no_integer": (2, 1)}


def test_a_text_with_several_formulas_keeps_its_dollars_and_a_context_stands_before_its_question(tmp_path):
    row = OLYMPIADBENCH | {"final_answer": ["$1$ and $2$"], "context": "Let $x$ be real."}
    rows, _ = prepared("olympiadbench", tmp_path / "out", write(tmp_path / "o.jsonl", row))
    (found,) = rows["test"]
    assert (found["question"], found["answer"]) == ("Let $x$ be real.\nFind all $x$.", "$1$ and $2$")


def test_minif2f_is_statement_and_proof_in_words_and_never_verifiable(tmp_path):
    write(tmp_path / "valid.jsonl", MINIF2F)
    write(tmp_path / "test.jsonl", MINIF2F, MINIF2F | {"informal_proof": ""})
    rows, _ = prepared("minif2f", tmp_path / "out", tmp_path, judge=never)
    (row,) = rows["test"]
    assert rows["validation"] == rows["test"] and not row["verifiable"]
    assert (row["question"], row["answer"], row["source"]) == (
        MINIF2F["informal_stmt"],
        MINIF2F["informal_proof"],
        "mathd",
    )


def test_gpqa_is_a_letter_and_the_options_stand_in_an_order_of_the_questions_own(tmp_path):
    """Over 4000 questions the right option has every letter about equally often, whatever file it is in."""
    many = [GPQA | {"Question": f"Which decays? ({number})"} for number in range(4000)]
    letters = [gpqa(row).answer for row in many]
    assert all(900 < letters.count(letter) < 1100 for letter in "ABCD")
    rows, manifest = prepared("gpqa", tmp_path / "a", write(tmp_path / "gpqa.csv", *many[9:0:-1]))
    assert [row["answer"] for row in rows["test"]] == letters[9:0:-1]
    for row in rows["test"]:
        assert f"\n{row['answer']}) the muon\n" in row["question"]
        assert all(f") {GPQA[f'Incorrect Answer {number}']}\n" in row["question"] for number in (1, 2, 3))
    assert row["source"] == "Physics" and row["chain_of_thought"] == "It is heavier." and row["id"] == "rec06"
    assert "not to publish" in manifest["source"]["conditions"]


def test_a_tenth_is_held_out_by_its_text_whatever_stands_around_it(tmp_path):
    some = numbered(NUMINA, 40)
    rows, _ = prepared("numina", tmp_path / "a", write(tmp_path / "some.jsonl", *some))
    assert (len(rows["train"]), len(rows["validation"])) == (36, 4)
    again, _ = prepared("numina", tmp_path / "b", write(tmp_path / "again.jsonl", *reversed(some)))
    assert {row["question"] for row in rows["validation"]} == {row["question"] for row in again["validation"]}
    many, _ = prepared("numina", tmp_path / "c", write(tmp_path / "many.jsonl", *numbered(NUMINA, 7000)))
    assert len(many["validation"]) == 640


def test_the_manifest_names_licence_local_files_counts_and_checksums(tmp_path):
    path = write(tmp_path / "numina.jsonl", *numbered(NUMINA, 3))
    rows, manifest = prepared("numina", tmp_path / "out", path)
    assert manifest["name"] == "numina"
    assert manifest["source"] == {
        "home": "AI-MO/NuminaMath-1.5",
        "licence": "Apache-2.0",
        "local_copy": {str(path): hashlib.sha256(path.read_bytes()).hexdigest()},
    }
    assert set(manifest["files"]) == {"train.parquet", "validation.parquet"}
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == hashlib.sha256((tmp_path / "out" / "numina" / name).read_bytes()).hexdigest()
        assert entry["rows"] == entry["verifiable"] == len(rows[Path(name).stem])
    assert [step["drops"] for step in manifest["filters"]["train"]] == [
        FILTERS[name] for name in PUBLISHED["numina"].filters
    ]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_is_asked_for_at_one_commit_only(name):
    published = PUBLISHED[name]
    assert name == "minerva" or (len(published.revision) == 40 and int(published.revision, 16))
    for revision in (None, "0" * 40):
        for (address,) in published_files(published, revision).values():
            assert (revision or published.revision) in address and "{" not in address


def test_prepared_files_are_read_by_the_data_loader(tmp_path, tokenizer):
    prepared("numina", tmp_path / "out", write(tmp_path / "numina.jsonl", *numbered(NUMINA, 20)))
    config = DataConfig(
        train_path=str(tmp_path / "out" / "numina" / "train.parquet"),
        validation_path=str(tmp_path / "out" / "numina" / "validation.parquet"),
        chain_of_thought_key="chain_of_thought",
    )
    train = load_prompts(config, "train", tokenizer, AnswerConfig()).prompts
    validation = load_prompts(config, "validation", tokenizer, AnswerConfig()).prompts
    assert (len(train), len(validation)) == (18, 2)
    assert all(prompt.answer == r"\{-2, 2\}" for prompt in (*train, *validation))
    assert train[0].chain_of_thought == "Taking roots, $x=2$ or $x=-2$"


# ---- what cannot be prepared


def refused(kind, name, out, local):
    with pytest.raises(kind) as caught:
        prepare(name, out, only_short, Origin(local))
    assert "\n" not in str(caught.value)
    assert not out.exists() or not [path for path in out.iterdir() if path.name != name]
    return str(caught.value)


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
    path = write(tmp_path / "numina.jsonl", {key: NUMINA[key] for key in ("problem", "solution", "answer", "source")})
    line = refused(DataError, "numina", tmp_path / "out", path)
    missing = "'question_type', 'problem_is_valid', 'solution_is_valid'"
    assert line.startswith(f"{path}: no column {missing}; it has answer, problem, solution, source.")
    assert line.endswith("Give a file with the columns of AI-MO/NuminaMath-1.5.")


def test_an_unknown_name_lists_those_there_are(tmp_path):
    line = refused(ConfigError, "numena", tmp_path / "out", None)
    known = (
        "math, numina, numina_proof, gsm8k, proofnet, math500, aime24, aime25, olympiadbench, minerva, minif2f, gpqa, "
        "own"
    )
    assert line == f"NAME='numena': no such data set. Choose one of {known}."


def test_an_existing_target_is_left_alone(tmp_path):
    (tmp_path / "out" / "gsm8k").mkdir(parents=True)
    line = refused(ConfigError, "gsm8k", tmp_path / "out", None)
    assert line.startswith("--out=") and f"{tmp_path}/out/gsm8k exists. Remove it" in line


def test_a_split_without_a_file_is_named(tmp_path):
    write(tmp_path / "train.jsonl", GSM8K)
    line = refused(ConfigError, "gsm8k", tmp_path / "out", tmp_path)
    assert line == f"--from='{tmp_path}': holds no file of the test split. Name it test.jsonl or test.parquet."
    assert "no such file or folder" in refused(ConfigError, "gsm8k", tmp_path / "out", tmp_path / "none")


def test_a_file_that_is_no_parquet_or_json_is_named(tmp_path):
    for file in ("numina.parquet", "numina.jsonl"):
        (tmp_path / file).write_text("{no data\n")
        line = refused(DataError, "numina", tmp_path / "out", tmp_path / file)
        assert line.startswith(f"{tmp_path}/{file}: cannot be read (") and line.endswith("Mend the file.")


def test_files_without_a_usable_row_are_refused(tmp_path):
    line = refused(DataError, "numina", tmp_path / "out", write(tmp_path / "p.jsonl", NUMINA_PROOF))
    assert line.startswith(f"{tmp_path}/p.jsonl: of 1 rows none is left") and "'proof': 1" in line
    line = refused(DataError, "numina", tmp_path / "out", write(tmp_path / "n.jsonl", NUMINA))
    assert line.startswith("1 usable row: at least 2 are needed")


# ---- the real files


@needs_real
def test_the_real_gsm8k_is_prepared_whole(tmp_path):
    rows, manifest = prepared("gsm8k", tmp_path / "out", REAL / "gsm8k")
    assert {split: len(kept) for split, kept in rows.items()} == {"train": 7473, "test": 1319}
    assert all(row["answer"].lstrip("-").replace(".", "", 1).isdigit() for kept in rows.values() for row in kept)


@needs_real
def test_the_real_proofnet_loses_the_two_rows_without_a_proof(tmp_path):
    rows, manifest = prepared("proofnet", tmp_path / "out", REAL / "proofnet", judge=never)
    assert {split: len(kept) for split, kept in rows.items()} == {"validation": 184, "test": 185}
    assert steps(manifest, "test") == {"blank": (186, 185)}
    assert not [row for kept in rows.values() for row in kept if "{proof}" in row["answer"]]
