"""What the doctor says of sampled completions."""

import pytest

from nemo_jepo.tools.doctor.findings import OK, WARNING
from nemo_jepo.tools.doctor.samples import check_samples, marker_rate
from nemo_jepo.types import Rollout
from tests.unit.doctor.test_run import config


def completions(*lengths, cut=0):
    reasons = ["length"] * cut + ["stop"] * (len(lengths) - cut)
    return [
        Rollout(0, i, (0,) * n, (0.0,) * n, reason) for i, (n, reason) in enumerate(zip(lengths, reasons, strict=True))
    ]


@pytest.mark.parametrize(("found", "level"), [(6, OK), (5, WARNING)])
def test_less_than_60_percent_is_a_warning(found, level):
    finding = marker_rate([True] * found + [False] * (10 - found), completions(*[4] * 5, *[8] * 5, cut=1))
    assert finding.level == level and bool(finding.fix) == (level == WARNING)
    assert (
        finding.text
        == f"{found} of 10 completions have the marker; 6 tokens on average, 1 cut off at rollout.max_tokens"
    )


def test_completions_that_are_cut_off_need_room_first():
    finding = marker_rate([False] * 4, completions(4, 4, 4, 4, cut=3))
    assert "raise rollout.max_tokens, show solved examples" in finding.fix


def test_the_runs_own_model_writes_one_completion_of_each_prompt():
    """From random weights: nothing to read, but the way from settings to text is the run's."""
    small = ["model.hf_config.hidden_size=32", "model.hf_config.num_hidden_layers=1", "tokenizer.train_vocab_size=270"]
    settings = config("data.arithmetic.num_train=20", "rollout.max_tokens=5", "answer.marker=zebra", *small)
    rate, text = check_samples(settings)
    assert rate.level == WARNING and rate.text.startswith("0 of 16 completions have the marker; ")
    assert (text.subject, text.level) == ("a completion", OK) and text.text
