"""The frozen initial policy stands in for the trained one and leaves it as it was; two pipeline stages, tied."""

import json
from pathlib import Path

import pytest

from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> list[dict[str, dict[str, float | bool]]]:
    """By rank, then by case."""
    file = tmp_path_factory.mktemp("reference") / "out.json"
    run_ranks(2, [str(Path(__file__).with_name("reference_worker.py")), str(file)])
    return json.loads(file.read_text())


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("case", ["fp32 cpu", "fp32 gpu", "bf16 cpu", "bf16 gpu"])
def test_the_reference_policy_scores_as_at_the_start_and_the_trained_weights_return(case, rank, reports):
    report = reports[rank][case]
    assert report.pop("moved") > 0.1, "training must move the scores for the rest to mean anything"
    assert report == {
        "none_kept_is_none": True,
        "reference_scores_differ": 0.0,
        "own_scores_differ": 0.0,
        "restored": True,
        "inside_is_initial": True,
        "restored_after_exception": True,
        "reference_survives_exception": True,
    }
