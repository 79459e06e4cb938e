"""`nemo-jepo data prepare` as a user runs it: the real verifier, no network, a disk that is full."""

import json
import os
import secrets
import subprocess
import sys

import pyarrow.parquet
import pytest

from nemo_jepo import cli
from nemo_jepo.tools.prepare import command
from tests.support import fork_server
from tests.support.command_line import ENVIRONMENT, ROOT
from tests.support.command_line import run as run_tiny
from tests.support.published_rows import MATH, NUMINA_PROOF, numbered, write

pytestmark = pytest.mark.quick


# Where no file may grow beyond 40 kB, which tells of a full disk as a full disk does.
ON_A_FULL_DISK = """
import resource
from nemo_jepo.cli import main

resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
raise SystemExit(main())
"""


@pytest.fixture
def run(capfd):
    """Exit code, stdout, stderr of `nemo-jepo data ...`."""

    def in_process(*arguments):
        try:
            code = cli.main(["data", *map(str, arguments)])
        except SystemExit as end:  # how argparse ends
            code = end.code
        return code, *capfd.readouterr()

    return in_process


def test_the_command_asks_the_verifier_shows_progress_and_prints_the_files(run, tmp_path):
    prose = MATH | {"solution": r"\boxed{\text{odd}}"}
    for split in ("train", "test"):
        write(tmp_path / "MATH" / f"{split}.jsonl", MATH, prose)
    code, out, err = run("prepare", "math", "--from", tmp_path / "MATH", "--out", tmp_path / "o", "--workers", "1")
    assert (code, out.splitlines()) == (
        0,
        [f"{tmp_path}/o/math/{split}.parquet  2 rows, 1 verifiable" for split in ("train", "test")],
    ), err
    rows = pyarrow.parquet.read_table(tmp_path / "o" / "math" / "train.parquet").to_pylist()
    assert [(row["answer"], row["verifiable"]) for row in rows] == [(r"\frac{5}{6}", True), (r"\text{odd}", False)]
    assert "read train" in err and "verifier: 100%" in err


def test_a_file_of_ones_own_is_cleaned_step_by_step_and_every_step_is_printed(run, tmp_path):
    """The five rows of the guide, and all steps: the options' order is not the order of the steps."""
    baker = "A baker fills 6 trays with 8 rolls each and sells 31 of them. How many rolls are left"
    pencils = "Lena has 3 boxes of 12 pencils. She gives 5 pencils away."
    train = "A train leaves at 9:40 and arrives at 11:05. How many minutes does it take?"
    questions = {f"{baker}?": 17, f"{baker} over?": 17, f"{pencils} How many?": 31, "What is 17 * 23?": 391, train: 85}
    mine = write(tmp_path / "mine.jsonl", *({"ask": question, "answer": say} for question, say in questions.items()))
    test = write(tmp_path / "test.jsonl", {"question": f"Tom has 2 cats. {pencils} Who has more?"})
    rates = write(
        tmp_path / "rates.jsonl",
        *({"id": f"train/{number}", "pass_rate": rate} for number, rate in ((0, 1.0), (3, 0.25), (4, 0.5))),
    )
    steps = ["--cluster", 2, "--select", "zip:2", "--keep-difficulty", "0.1:0.9", "--difficulty", rates]
    steps += ["--decontaminate", test, "--near-duplicates", "0.8"]
    source = ("own", "--from", mine, "--prompt-key", "ask", "--out", tmp_path / "o", "--workers", "1")
    code, out, err = run("prepare", *source, *steps)
    assert (code, out.splitlines()) == (
        0,
        [
            "near_duplicates: 1 of 5 training rows dropped",
            f"decontaminate: 1 of 4 training rows dropped (1 for {test})",
            "difficulty: 3 of 3 rows have one, from 0 to 0.75, median 0.5",
            "keep_difficulty: 1 of 3 training rows dropped",
            "select: 0 of 2 training rows dropped",
            "cluster: 2 clusters of 1 to 1 rows",
            f"{tmp_path}/o/own/train.parquet  2 rows, 2 verifiable",
        ],
    ), err
    rows = pyarrow.parquet.read_table(tmp_path / "o" / "own" / "train.parquet").to_pylist()
    assert [(row["id"], row["answer"], row["difficulty"]) for row in rows] == [
        ("train/3", "391", 0.75),
        ("train/4", "85", 0.5),
    ]


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path):
    """In a true process: the hub's library reads these variables when it is imported."""
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    variables |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}
    prepare = [sys.executable, "-m", "nemo_jepo.cli", "data", "prepare", "numina", "--out", str(tmp_path / "out")]
    done = subprocess.run(prepare, capture_output=True, text=True, env=variables, timeout=200)
    line = done.stderr
    assert (done.returncode, done.stdout, line.count("\n")) == (2, "", 1), line
    assert line.startswith("hf://datasets/AI-MO/NuminaMath-1.5@1b05109f9e5c1ad06c0663519502416c30b300f8/data/")
    assert "cannot be read (" in line and line.endswith("or give a local copy with --from PATH.\n")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(run, tmp_path):
    proofs = [row | {"solution": secrets.token_hex(1000)} for row in numbered(NUMINA_PROOF, 200)]
    path = write(tmp_path / "proofs.jsonl", *proofs)
    arguments = ("prepare", "numina_proof", "--from", path, "--out", tmp_path / "out")
    done = fork_server.run(["-c", ON_A_FULL_DISK, "data", *map(str, arguments)], environment=ENVIRONMENT)
    line = done.stderr.splitlines()[-1]
    assert (done.returncode, done.stdout) == (2, "") and "Traceback" not in done.stderr
    assert line.startswith(f"{tmp_path}/out/numina_proof: cannot be written (File too large). Make room")
    assert list((tmp_path / "out").iterdir()) == []

    code, _, err = run(*arguments)
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "numina_proof" / "manifest.json").read_text())["paper"]["prepared"] == 200


def test_a_wrong_command_line_is_exit_code_2_with_the_usage(run):
    for arguments in ((), ("prepare",), ("prepare", "math", "--workers", "0"), ("mend", "math")):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "") and err.startswith("usage: nemo-jepo data")


def test_a_local_copy_has_no_revision(run, tmp_path):
    code, _, line = run("prepare", "math", "--from", tmp_path, "--revision", "main")
    assert (code, line) == (2, "--revision='main': a local copy has none. Leave out --revision or --from.\n")


def test_an_interruption_is_one_line_and_leaves_nothing(run, tmp_path, monkeypatch):
    def interrupted(answers, num_workers):
        raise KeyboardInterrupt

    for split in ("train", "test"):
        write(tmp_path / "MATH" / f"{split}.jsonl", MATH)
    monkeypatch.setattr(command, "verifiable_answers", interrupted)
    code, _, err = run("prepare", "math", "--from", tmp_path / "MATH", "--out", tmp_path / "out")
    assert (code, err.splitlines()[-1]) == (130, "interrupted")
    assert not (tmp_path / "out").exists()


def test_help_names_the_data_sets(run):
    code, out, _ = run("prepare", "--help")
    assert code == 0 and "math, numina, numina_proof, gsm8k, proofnet, math500" in " ".join(out.split())


def test_what_an_evaluation_says_of_each_question_is_how_hard_it_is(run, tmp_path):
    """The two commands of the guide: rate the training rows, and prepare them again with what was found."""
    file, rates = tmp_path / "mine.jsonl", tmp_path / "rates.jsonl"
    rows = [{"question": f"What is {n} plus {n}?", "answer": answer} for n, answer in enumerate(("0", "2", "odd", "6"))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare = ["prepare", "own", "--from", file, "--workers", "1"]
    assert run(*prepare, "--out", tmp_path / "data")[0] == 0
    data = tmp_path / "data" / "own" / "train.parquet"
    settings = ["data=jsonl", f"data.train_path={data}", f"data.validation_path={data}"]
    settings += ["data.max_prompt_tokens=40", "data.max_answer_tokens=16", f"evaluation.pass_rates={rates}"]
    run_tiny("evaluate", tmp_path, *settings, "evaluation.num_generations_per_prompt=3", "evaluation.greedy=false")
    written = [json.loads(line) for line in rates.read_text().splitlines()]
    assert [row["question"] for row in written] == [row["question"] for row in rows]
    assert [row["by"] for row in written] == ["verifier", "verifier", "likelihood", "verifier"]
    assert all(row["num_samples"] == 3 and 0 <= row["pass_rate"] <= 1 for row in written)
    code, _, err = run(*prepare, "--out", tmp_path / "again", "--difficulty", rates)
    assert code == 0, err
    again = pyarrow.parquet.read_table(tmp_path / "again" / "own" / "train.parquet").to_pylist()
    assert [row["difficulty"] for row in again] == pytest.approx([1 - row["pass_rate"] for row in written], abs=1e-9)
