"""The frozen initial policy stands in for the trained one and leaves it as it was; two pipeline stages, tied."""

import pytest

from tests.distributed.reference_jobs import swapped
from tests.support.rank_pool import on_ranks


@pytest.mark.parametrize("place", ["cpu", "gpu"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_reference_policy_scores_as_at_the_start_and_the_trained_weights_return(precision, place):
    for report in on_ranks(2, swapped, precision, place):
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
