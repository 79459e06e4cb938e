"""A few inputs of every campaign of `make fuzz`, and what the campaign itself does with one that fails."""

import time

import pytest
from hypothesis import strategies as st

from nemo_jepo.config.errors import ConfigError, DataError
from tests.fuzz.campaigns import CAMPAIGNS
from tests.fuzz.runner import Campaign, quiet_libraries, run, table

COUNTS = {"settings": 15, "rows": 50, "parquet": 50, "safetensors": 50, "config": 40, "tokenizer": 40, "folder": 20}


@pytest.mark.parametrize("name", COUNTS)  # those of checkpoints have a test among those that start ranks
def test_every_input_is_accepted_or_refused_in_one_line(name, tmp_path):
    with quiet_libraries():
        result = run(name, CAMPAIGNS[name], COUNTS[name], 0, tmp_path)
    assert not result.failures, result.failures[0]
    assert result.tried == result.accepted + result.refused > COUNTS[name] // 2


def counted(target, tmp_path, **options):
    return run("none", Campaign(st.integers(0, 3), target, **options), 50, 0, tmp_path)


def test_a_line_is_no_failure_and_everything_else_is_one_with_its_input_in_a_file(tmp_path):
    def target(number):
        if number == 1:
            raise ConfigError("a", 1, "b", "c")
        if number == 2:
            raise DataError("one line")
        if number == 3:
            raise ZeroDivisionError

    result = counted(target, tmp_path)
    assert result.kinds == {"ZeroDivisionError in the target"} and result.refused and result.accepted
    assert len(result.failures) == len(list(tmp_path.iterdir())) and (tmp_path / "none_0000").read_text() == "3"
    assert table({"none": result}).splitlines()[-1].split() == [
        "all",
        *map(str, (result.tried, result.refused, result.accepted, len(result.failures))),
    ]


def test_an_input_that_takes_too_long_is_a_failure(tmp_path):
    result = counted(lambda number: time.sleep(9 * (number == 3)), tmp_path, limit_s=0.05)
    assert result.kinds == {"TooLong in the target"}


def test_the_same_seed_makes_the_same_inputs(tmp_path):
    def inputs(number):
        found = []
        run("none", Campaign(CAMPAIGNS["rows"].inputs, found.append), 60, number, tmp_path)
        return found

    assert inputs(1) == inputs(1) != inputs(2)
