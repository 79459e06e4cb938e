"""Tables of results, from rows whose means and spreads are known."""

import pyarrow
import pyarrow.parquet
import pytest

from nemo_jepo.tools.report.page import render
from nemo_jepo.tools.report.results import COLUMNS, read_results
from nemo_jepo.tools.report.tables import START, markdown, tables_of
from tests.unit.report.test_page import Page

LAST = {("jepo", 1): 0.9, ("jepo", 2): 0.7, ("jepo", 3): 0.8, ("rloo", 1): 0.5, ("rloo", 2): 0.5, ("rloo", 3): 0.5}


def table_of(tmp_path, rows):
    columns = dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True))
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "results.parquet")
    return tables_of(read_results(tmp_path / "results.parquet"))


def rows(metric="oracle_accuracy", scale=1.0, start=0.25, last=LAST):
    for (arm, seed), value in last.items():
        yield "mine", "verifiable", arm, seed, 0, f"val_rollouts/{metric}", start * scale
        yield "mine", "verifiable", arm, seed, 40, f"val_rollouts/{metric}", value * scale


def test_a_cell_is_the_mean_and_the_ends_over_seeds_after_the_last_update(tmp_path):
    (table,) = table_of(tmp_path, [*rows(), *rows("cot_tokens_mean", 10), *rows("kl", -1e-9)])
    assert table.title == "mine (verifiable, 3 seeds)"
    assert table.caption.startswith("After update 40")
    assert table.columns == ["accuracy (oracle)", "KL, nats", "chain of thought, tokens"]
    assert table.rows == [
        (START, ["0.250 (0.250 to 0.250)", "0.00 (0.00 to 0.00)", "2.5 (2.5 to 2.5)"]),
        ("jepo", ["0.800 (0.700 to 0.900)", "0.00 (0.00 to 0.00)", "8.0 (7.0 to 9.0)"]),
        ("rloo", ["0.500 (0.500 to 0.500)", "0.00 (0.00 to 0.00)", "5.0 (5.0 to 5.0)"]),
    ]


def test_markdown_is_a_table_under_its_title(tmp_path):
    seed_1 = {key: value for key, value in LAST.items() if key[1] == 1}
    assert markdown(table_of(tmp_path, rows(last=seed_1))) == (
        "### mine (verifiable, 1 seed)\n\n"
        "After update 40, held out: mean over seeds (smallest to largest).\n\n"
        "| arm | accuracy (oracle) |\n| --- | ---: |\n| at step 0 | 0.250 |\n| `jepo` | 0.900 |\n| `rloo` | 0.500 |\n"
    )


def test_a_column_that_repeats_the_oracles_is_left_out(tmp_path):
    same = [*rows(), *rows("accuracy"), *rows("oracle_accuracy_verifiable"), *rows("oracle_accuracy_unverifiable", 0.5)]
    assert table_of(tmp_path, same)[0].columns == ["accuracy (oracle)", "of it: the others"]
    assert table_of(tmp_path, rows("accuracy"))[0].columns == ["accuracy (exact match)"]


def test_votes_of_sixteen_samples_stand_beside_the_accuracy(tmp_path):
    votes = [row for vote in ("best", "weighted_maj", "maj") for row in rows(f"{vote}_at_16")]
    columns = ["accuracy (oracle)", "majority of 16", "weighted vote of 16", "best of 16"]
    assert table_of(tmp_path, [*votes, *rows()])[0].columns == columns


def test_arms_that_end_sooner_are_named(tmp_path):
    short = [row for row in rows() if row[2] != "rloo" or row[4] < 40]
    assert table_of(tmp_path, short)[0].caption.startswith("After update 40 (`rloo`: 0), held out")


def test_arms_that_begin_apart_have_no_common_start(tmp_path):
    apart = [(*row[:6], 0.1) if row[2] == "jepo" and row[4] == 0 else row for row in rows()]
    assert [arm for arm, _ in table_of(tmp_path, apart)[0].rows] == ["jepo", "rloo"]


def test_a_set_that_begins_without_an_evaluation_has_no_row_of_its_start(tmp_path):
    (table,) = table_of(tmp_path, [row for row in rows() if row[4]])
    assert [arm for arm, _ in table.rows] == ["jepo", "rloo"]


def test_what_an_arm_never_logged_is_an_empty_cell(tmp_path):
    (table,) = table_of(tmp_path, [*rows(), *(row for row in rows("kl") if row[2] == "jepo")])
    assert dict(table.rows)["rloo"] == ["0.500 (0.500 to 0.500)", ""]
    assert dict(table.rows)[START][1] == "0.25 (0.25 to 0.25)"


def test_results_without_a_column_have_no_table(tmp_path):
    assert table_of(tmp_path, rows("marker_rate")) == []


@pytest.mark.parametrize("arm", ["jepo", "a<script>"])
def test_the_page_has_the_table_as_text(tmp_path, arm):
    (table,) = table_of(tmp_path, [(*row[:2], arm, *row[3:]) for row in rows() if row[2] == "jepo"])
    assert [arm, "0.800 (0.700 to 0.900)"] in Page(render([], [], [table])).rows
