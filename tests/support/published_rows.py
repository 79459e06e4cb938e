"""Rows with the columns of the published data sets, and files of them."""

import json
from pathlib import Path

import pyarrow
import pyarrow.csv
import pyarrow.parquet

MATH = {
    "problem": r"What is $\frac{1}{2} + \frac{1}{3}$?",
    "level": "Level 1",
    "type": "Prealgebra",
    "solution": r"With denominator 6, $\frac{3}{6} + \frac{2}{6} = \boxed{\frac{5}{6}}$.",
}
GSM8K = {"question": "How many clips?", "answer": "He sold 48/2 = <<48/2=24>>24.\nTogether 1,200.\n#### 1,200"}
PROOFNET = {
    "id": "Rudin|exercise_1_1a",
    "formal_statement": "theorem exercise_1_1a",
    "src_header": "import .common",
    "nl_statement": "If $r$ is rational and $x$ is irrational, prove that $r+x$ is irrational.",
    "nl_proof": "\\begin{proof}\n\n    If $r$ and $r+x$ were both rational, so would $x=r+x-r$ be.\n\n\\end{proof}",
}
NUMINA = {
    "problem": "## Problem 3.\n\nFind all real $x$ with $x^2 = 4$.",
    "solution": "## Solution.\n\nTaking roots, $x=2$ or $x=-2$.",
    "answer": r"\{-2, 2\}",
    "problem_type": "Algebra",
    "question_type": "math-word-problem",
    "problem_is_valid": "Yes",
    "solution_is_valid": "Yes",
    "source": "olympiads",
    "synthetic": False,
}
NUMINA_PROOF = NUMINA | {
    "problem": "24. A6 (ROU) Let $n$ be even. Prove that $n^2$ is even.",
    "solution": "Solution. With $n=2k$ we have $n^2=2(2k^2)$. ",
    "answer": "proof",
    "question_type": "proof",
    "source": "olympiads_ref",
}

MATH500 = {
    "problem": "What is $1+1$?",
    "solution": r"It is $\boxed{2}$.",
    "answer": "2",
    "subject": "Algebra",
    "level": 1,
    "unique_id": "test/algebra/1.json",
}
AIME24 = {"id": 60, "problem": "Find it.", "solution": "...", "answer": "033", "url": "http://x", "year": "2024"}
AIME25 = {"problem": "Find it.", "answer": "70", "id": "0"}
OLYMPIADBENCH = {
    "id": 1606,
    "question": "Find all $x$.",
    "solution": ["By hand, $x=1$ or $x=2$.", "Another way."],
    "final_answer": ["$1$", "$2$ "],
    "context": None,
    "modality": "Text-only",
    "is_multiple_answer": True,
    "unit": None,
    "answer_type": "Numerical",
    "subfield": "Algebra",
    "subject": "Math",
    "language": "English",
}
MINERVA = {"question": "How many watts?", "answer": r"4.5e33"}
MINIF2F = {
    "id": "mathd_algebra_478",
    "split": "test",
    "formal_statement": "theorem mathd_algebra_478",
    "header": "import Mathlib",
    "informal_stmt": "Show that it is 65.",
    "informal_proof": "We are given $B = 30$, so it is $65$.",
}
GPQA = {
    "Record ID": "rec06",
    "Question": "Which decays?",
    "Correct Answer": "the muon",
    "Incorrect Answer 1": "the electron",
    "Incorrect Answer 2": "the photon",
    "Incorrect Answer 3": "the proton, in theory",
    "Explanation": "It is heavier.",
    "Subdomain": "Particles",
    "High-level domain": "Physics",
}


def write(path: Path, *rows: dict) -> Path:
    """The rows as JSONL, CSV or Parquet, by the name of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".csv":
        pyarrow.csv.write_csv(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def numbered(row: dict, count: int) -> list[dict]:
    """Copies with different questions."""
    return [row | {"problem": f"{row['problem']} ({number})"} for number in range(count)]
