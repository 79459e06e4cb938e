"""The warning that chains of thought stop reasoning: its rule, and that a resumed run keeps its own start."""

import json

import pytest

from nemo_jepo.collapse import HELD_OUT_GAIN, LENGTH, STEP_GAIN, VALID, ChainWatch, has_collapsed
from nemo_jepo.config.schema import ExpManagerConfig
from nemo_jepo.tracking import Tracker


@pytest.mark.parametrize(
    ("start", "length", "collapsed"),
    [
        (8.8, 0.8, True),  # the bare marker is left
        (8.8, 1.2, False),
        (300.0, 29.0, True),  # a tenth
        (300.0, 160.0, False),  # 140 tokens less, and still reasoning
        (300.0, 149.0, True),
        (18.0, 8.5, False),  # less than half, but 9.5 tokens less
        (22.0, 9.0, True),
        (0.4, 0.4, True),  # there never was any
    ],
)
def test_chains_have_collapsed_where_a_tenth_or_half_and_ten_tokens_less_or_nothing_is_left(start, length, collapsed):
    assert has_collapsed(length, start) is collapsed


def test_a_collapse_is_said_once_with_its_step_its_lengths_and_what_to_do():
    watch = ChainWatch(256)
    assert (
        watch.see(10, {HELD_OUT_GAIN: -1.0}) == []
    )  # of a warm-up, or before training: no chain was sampled to train on
    assert watch.see(11, {LENGTH: 12.8}) == []
    (line,) = watch.see(17, {LENGTH: 0.9})
    assert line.startswith(
        "step 17: chains of thought collapsed, from 12.8 tokens before the marker at step 11 to 0.9. "
    )
    assert "warmup.sft_target=chain_of_thought" in line and "objective=nrt" in line
    assert watch.see(18, {LENGTH: 0.5}) == []
    assert (watch.collapsed_at, watch.useless_at) == (17, None)


def test_chains_that_do_not_pay_are_said_at_the_first_validation_that_shows_it():
    watch = ChainWatch(256)
    assert watch.see(10, {LENGTH: 9.0, HELD_OUT_GAIN: 0.2}) == []
    (line,) = watch.see(20, {LENGTH: 9.0, HELD_OUT_GAIN: -0.3})
    assert line.startswith("step 20: half of the held-out answers are no likelier behind a chain of thought")
    assert watch.see(30, {LENGTH: 9.0, HELD_OUT_GAIN: -0.4}) == []


def test_a_step_without_a_valid_chain_says_nothing_and_sets_no_start():
    watch = ChainWatch(256)
    assert watch.see(1, {}) == watch.see(2, {LENGTH: None}) == []
    assert watch.start is None


def test_steps_with_few_valid_chains_are_read_together_and_alone_say_nothing():
    watch = ChainWatch(32)
    few = {VALID: 0.25}  # 8 valid chains a step
    for step, length in enumerate([50.0, 30.0, 40.0, 40.0], start=1):
        assert watch.see(step, {LENGTH: length} | few) == []
    assert (watch.start, watch.first_step) == (40.0, 1)
    assert watch.see(5, {LENGTH: 0.0} | few) == []  # (30 + 40 + 40 + 0) / 4: one bad batch
    assert watch.see(6, {LENGTH: 0.0} | few) == []  # 20 = start / 2
    (line,) = watch.see(7, {LENGTH: 0.0, VALID: 0.5})  # 16 more: (40 * 8 + 0 * 32) / 40
    assert line.startswith("step 7: chains of thought collapsed, from 40.0") and "to 0.0." in line


def test_the_gain_of_every_step_is_watched_where_a_run_scores_it():
    watch = ChainWatch(32)
    assert watch.see(1, {LENGTH: 9.0, STEP_GAIN: 0.5, VALID: 0.5}) == []
    assert watch.see(2, {LENGTH: 9.0, STEP_GAIN: -0.4, VALID: 0.5}) == []
    (line,) = watch.see(3, {LENGTH: 9.0, STEP_GAIN: 0.2, VALID: 0.5})
    assert (
        line.startswith("step 3: answers are no likelier behind their chains of thought than without")
        and "-0.10" in line
    )
    assert watch.useless_at == 3


def test_a_resumed_run_compares_with_its_own_first_step_and_does_not_repeat_a_warning(tmp_path, capsys):
    def run(first_step, lengths):
        with Tracker(tmp_path, ExpManagerConfig(name="x", create_tensorboard_logger=False), 9, 64) as tracker:
            tracker.rewind(first_step - 1 if first_step > 1 else -1)
            for step, length in enumerate(lengths, start=first_step):
                tracker.log({LENGTH: length}, step)
        return capsys.readouterr().err.count("chains of thought collapsed")

    assert run(1, [40.0, 30.0]) == 0
    assert run(3, [15.0]) == 1  # half of the 30 alone would not be a collapse: the start is 40
    assert run(4, [14.0]) == 0
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
