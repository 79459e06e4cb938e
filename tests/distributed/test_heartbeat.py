"""A rank that is stopped or asleep is named, with host, phase and stack, and every other rank ends."""

import os
import re
import signal
import socket
import time
from collections.abc import Callable
from typing import IO, Any

import pytest

from tests.support.command_line import command, metrics
from tests.support.ranks import output_of, run_ranks, started

Ranks = list[tuple[Any, IO[str]]]
HOST = re.escape(socket.gethostname())


def steps(**settings) -> list[str]:
    given = ", ".join(f"{name}={value}" for name, value in settings.items())
    return ["-c", f"from tests.distributed.heartbeat_jobs import take_steps; take_steps({given})"]


def wait_until(condition: Callable[[], bool], ranks: Ranks) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, [output_of(file)[-2000:] for _, file in ranks]
        time.sleep(0.02)


def ended(ranks: Ranks, stuck: int) -> list[str]:
    """What the ranks have written when all but one have ended, each with the code of a failure."""
    for rank, (process, file) in enumerate(ranks):
        if rank != stuck:
            assert process.wait(timeout=120) == 1, output_of(file)[-2000:]
    return [output_of(file) for _, file in ranks]


@pytest.mark.parametrize("stopped", [0, 2])
def test_a_stopped_rank_is_named_and_all_others_end(stopped):
    with started(3, steps(timeout_s=6)) as ranks:
        wait_until(lambda: all("goes on" in output_of(file) for _, file in ranks), ranks)
        process, _ = ranks[stopped]
        os.kill(process.pid, signal.SIGSTOP)
        texts = ended(ranks, stopped)
        finder = texts[1 if stopped == 0 else 0]
        found = re.search(
            rf"rank {stopped} \(host {HOST}, pid {process.pid}\) is stuck: (.*); phase: (.*), at\n", finder
        )
        assert found is not None, finder
        assert "no sign of life for" in found[1] or "has not answered for" in found[1]
        assert "heartbeat_jobs.py:" in finder[found.end() :].splitlines()[1] + finder[found.end() :]
        for rank in {0, 1, 2} - {stopped}:
            assert f"rank {rank} ends" in texts[rank] and f"rank {stopped} (host" in texts[rank]


def test_a_rank_that_lives_and_sleeps_is_named_with_the_line_that_it_sleeps_in():
    with started(2, steps(timeout_s=6, sleeper=1)) as ranks:
        for process, file in ranks:
            assert process.wait(timeout=120) == 1, output_of(file)
        first, second = (output_of(file) for _, file in ranks)
    assert re.search(
        rf"rank 1 \(host {HOST}, pid \d+\) is stuck: no rank has gone on for \d+ s; phase: train_time", first
    )
    assert re.search(r"heartbeat_jobs.py:\d+ in fall_asleep", first) and "rank 0 (host" not in first
    assert "rank 1 ends, for rank 1 (host" in second


def test_ranks_that_end_at_different_times_are_not_stuck():
    assert "is stuck" not in run_ranks(2, steps(timeout_s=6, num_steps=40, last_rank=0))


def test_a_connection_that_breaks_is_made_again():
    """Steps go on for longer than the timeout."""
    assert "is stuck" not in run_ranks(2, steps(timeout_s=6, num_steps=900, cut=True))


def test_a_run_in_which_a_rank_is_stopped_ends_and_the_next_start_goes_on(tmp_path):
    arguments = command("train", tmp_path, "trainer.devices=2")
    with started(2, [*arguments, "trainer.stuck_timeout_s=8"]) as ranks:
        lines = tmp_path / "run" / "metrics.jsonl"
        wait_until(lambda: lines.exists() and lines.read_text().count("\n") >= 3, ranks)
        os.kill(ranks[1][0].pid, signal.SIGSTOP)
        first, _ = ended(ranks, 1)
    assert re.search(r"rank 1 \(host .*\) is stuck: no sign of life for \d+ s; phase: [a-z_ ]+, at\n", first), first
    assert "Traceback" not in first
    again = run_ranks(2, arguments)
    assert "is stuck" not in again and [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
