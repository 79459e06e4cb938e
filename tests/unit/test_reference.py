"""docs/reference/configuration.md is what the schema says."""

from pathlib import Path

from nemo_jepo.config.reference import page

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "configuration.md"


def test_the_page_of_settings_is_current():
    again = "run: make reference"
    assert PAGE.read_text() == page(), again


def test_every_setting_has_a_sentence_and_its_rules():
    rows = [line.split(" | ") for line in page().splitlines() if line.startswith("| `")]
    assert all(row[-1].removesuffix(" |").strip() for row in rows)
    found = {row[0].removeprefix("| "): row[1:4] for row in rows}
    assert found["`model.virtual_pipeline_model_parallel_size`"] == ["int or null", "`null`", "at least 1"]
    assert found["`warmup.sched.name`"] == ["str", "`constant`", "one of constant, cosine"]
    assert found["`evaluation.model_verifier.votes`"][1] == "`1`" and found["`evaluation.judge.votes`"][1] == "`5`"
