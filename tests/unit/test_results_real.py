"""docs/results-real.md shows what its results.parquet files hold."""

import re
from pathlib import Path

import pytest

from nemo_jepo.tools.report.results import read_all, read_results
from nemo_jepo.tools.report.tables import markdown, tables_of

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "results-real.md").read_text()
SETS = sorted((DOCS / "results-real").glob("*/results.parquet"))


@pytest.mark.parametrize("file", SETS, ids=[file.parent.name for file in SETS])
def test_the_page_has_the_table_of_each_set(file):
    lines = markdown(tables_of(read_all([file]))).splitlines()
    assert len(lines) > 4 and all(line in PAGE for line in lines if line.startswith("|"))


def test_every_picture_exists_and_every_set_is_shown():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", PAGE)
    assert all((DOCS / picture).is_file() for picture in pictures)
    assert {Path(picture).parent.name for picture in pictures} == {file.parent.name for file in SETS}


def test_the_readme_says_what_was_measured():
    """Accuracy of jepo before and after 20 updates, and of fine-tuning after its last."""
    (comparison,) = read_results(DOCS / "results-real" / "chain_sum" / "results.parquet")
    jepo, sft = (comparison.arms[arm]["accuracy"][1] for arm in ("jepo", "sft"))
    said = f"held-out accuracy from {jepo[0]:.2f} to {jepo[20]:.2f} in\n20 updates"
    readme = (DOCS.parent / "README.md").read_text()
    assert said in readme and f"comes to {sft[max(sft)]:.2f} in {max(sft)}" in readme
