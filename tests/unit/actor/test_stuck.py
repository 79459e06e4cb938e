"""Who is stuck, from made-up sights of ranks and made-up times."""

import pytest

from nemo_jepo.actor.heartbeat import Book, RunningClock
from nemo_jepo.actor.stuck import LONGEST_WAIT_S, Seen, not_going_on, silent
from nemo_jepo.utils import phases
from nemo_jepo.utils.phases import ALONE

COLLECTIVE = ("nemo_jepo/actor/parallel.py:120 in barrier", "torch/distributed/distributed_c10d.py:9 in barrier")
WORK = ("nemo_jepo/train.py:60 in run_step", "nemo_jepo/actor/actor.py:200 in train_step")
SERVER = ("nemo_jepo/rollout/queue.py:70 in take", "lib/python3.11/threading.py:331 in wait")


def rank(number: int, stack: tuple[str, ...] = WORK, of_phase: int = 7, **seen) -> Seen:
    known = {"host": f"node{number}", "pid": 100 + number, "phase": "train_time", "usual_s": 10.0}
    return Seen(rank=number, number=of_phase, stack=stack, **known | seen)


def names(ranks) -> list[int]:
    return [seen.rank for seen in ranks]


def test_a_rank_is_silent_from_the_limit_on_unless_it_has_said_that_it_is_done():
    ranks = [rank(0), rank(1, silent_s=164.9), rank(2, silent_s=165.0), rank(3, silent_s=900.0, ended=True)]
    assert names(silent(ranks, 165.0)) == [2]


def test_the_lines_of_a_stuck_rank_say_which_where_and_why():
    assert rank(3).shown("no sign of life for 171 s").splitlines() == [
        "rank 3 (host node3, pid 103) is stuck: no sign of life for 171 s; phase: train_time, at",
        "    nemo_jepo/train.py:60 in run_step",
        "    nemo_jepo/actor/actor.py:200 in train_step",
    ]


def stand(ranks: list[Seen], seconds: float) -> list[int]:
    """Who is named when all of them have stood still for so long."""
    still = [
        Seen(**{name: getattr(seen, name) for name in Seen.__slots__} | {"in_phase_s": seconds, "unmoved_s": seconds})
        for seen in ranks
    ]
    return names(not_going_on(still, 180.0))


LONG = 2 * 10 + 180.0


@pytest.mark.parametrize(
    ("ranks", "stuck"),
    {
        "behind": ([rank(0, COLLECTIVE, 8), rank(1), rank(2, COLLECTIVE, 8)], [1]),
        "behind, whatever it waits for": ([rank(0, COLLECTIVE, 8), rank(1, SERVER)], [1]),
        "not in the collective": ([rank(0, COLLECTIVE), rank(1), rank(2, COLLECTIVE)], [1]),
        "all in a collective": ([rank(0, COLLECTIVE), rank(1, COLLECTIVE)], [0, 1]),
        "nobody seen to wait, as on GPUs": ([rank(0), rank(1, SERVER)], [0, 1]),
        "all wait for servers": ([rank(0, SERVER), rank(1, SERVER)], []),
        "one is done": ([rank(0, COLLECTIVE), rank(1), rank(2, ended=True)], []),
        "rank 0 works alone": ([rank(0, phase=ALONE), rank(1, COLLECTIVE, phase=ALONE)], []),
    }.values(),
)
def test_who_does_not_go_on(ranks, stuck):
    assert stand(ranks, LONG) == stuck
    assert stand(ranks, LONG - 1) == []


def test_as_long_as_one_rank_goes_on_nobody_is_stuck():
    moving, standing = rank(0, in_phase_s=LONG - 1), rank(1, COLLECTIVE, 8, in_phase_s=3 * LONG)
    assert not_going_on([moving, standing], 180.0) == []


def test_the_slowest_ranks_usual_time_counts():
    """Rank 0 may generate for twice its ten minutes, though rank 1 is through and its own phase takes seconds."""
    ranks = [rank(0, phase="generate", usual_s=600.0), rank(1, COLLECTIVE, 8, usual_s=1.0)]
    assert stand(ranks, 2 * 600 + 179) == [] and stand(ranks, 2 * 600 + 180) == [0]


def test_without_a_usual_time_only_a_wait_as_long_as_a_collectives_ends_the_run():
    waited, worked = rank(0, COLLECTIVE, usual_s=None), rank(1, usual_s=None)
    assert stand([waited, worked], LONGEST_WAIT_S - 1) == []
    assert stand([waited, worked], LONGEST_WAIT_S) == [1]
    assert stand([worked, worked], 10 * LONGEST_WAIT_S) == []  # all load a large model


def test_a_clock_counts_no_time_in_which_its_process_was_stopped(monkeypatch):
    times = iter([0.0, 1.0, 2.5, 1000.0])
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    clock, seconds = RunningClock(longest_s=2.0), []
    for _ in range(3):
        clock.tick()
        seconds.append(clock.seconds)
    assert seconds == [1.0, 2.5, 4.5]


def test_what_is_heard_counts_from_when_it_changed():
    clock = RunningClock(2.0)
    book = Book(clock, [3, 4])

    def beat(number: int, phase: int, stack: str) -> bytes:
        known = '"rank": 3, "host": "n", "pid": 1, "phase": "generate", "usual_s": null, "ended": false'
        return f'{{"beat": {number}, "number": {phase}, "stack": ["{stack}"], {known}}}'.encode()

    moments = [(0, beat(1, 1, "a")), (10, beat(2, 1, "b")), (20, beat(3, 1, "b")), (30, beat(3, 1, "b"))]
    for clock.seconds, value in moments:
        book.write(value)
    seen, never = book.ranks()
    assert (seen.silent_s, seen.unmoved_s, seen.in_phase_s) == (10, 20, 30)
    assert (never.rank, never.silent_s) == (4, 30)


def test_a_phase_knows_its_longest_stretch_and_its_number(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    phases.leave_training()
    monkeypatch.setattr(phases, "_since", 0.0)
    first = phases.current().number

    def step(seconds: float) -> None:
        with phases.phase("step"):
            now[0] += 1
            with phases.phase("inner"):
                now[0] += seconds
                assert phases.current().name == "inner"
            now[0] += 2
            assert phases.current().name == "step"

    step(5.0)
    assert (phases.current().name, phases.current().number) == ("after step", first + 4)
    step(3.0)
    with phases.phase("inner"):
        assert phases.current().usual_s == 5.0
    with phases.phase("step"):
        assert phases.current().usual_s == 2.0
    with phases.phase("save_time"):
        now[0] += 1
    with phases.phase("save_time"):
        assert phases.current().usual_s is None
    phases.leave_training()
    assert phases.current().name == phases.OUTSIDE
    with phases.phase("inner"):
        assert phases.current().usual_s is None
