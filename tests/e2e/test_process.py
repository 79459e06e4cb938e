"""A worker process: what it answers, what ends it, and that nothing that it does reaches its parent."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from nemo_jepo.rewards.process import WorkerFault, WorkerProcess

pytestmark = pytest.mark.quick

MODULE = "tests.support.odd_worker"
CPU_LIMIT_S = 0.5
ENDLESS = 9**9


@pytest.fixture
def worker() -> Iterator[WorkerProcess]:
    with WorkerProcess(MODULE, CPU_LIMIT_S) as worker:
        yield worker


@pytest.fixture
def process_of_worker(worker) -> Callable[[], psutil.Process | None]:
    """The one child since the test began; None before the first request."""
    before = set(psutil.Process().children())

    def process() -> psutil.Process | None:
        children = set(psutil.Process().children()) - before
        assert len(children) <= 1
        return children.pop() if children else None

    return process


def test_it_starts_when_asked_answers_and_ends_when_closed(worker, process_of_worker):
    assert process_of_worker() is None
    for answer in (7, "\ud800\n", [1.5, None, {"a": True}]):
        assert worker.ask({"answer": answer}) == answer
    assert process_of_worker() is not None
    worker.close()
    assert process_of_worker() is None
    assert worker.ask({"answer": 8}) == 8


def test_a_failure_is_the_fault_of_one_request(worker, process_of_worker):
    worker.ask({})
    first = process_of_worker()
    with pytest.raises(WorkerFault, match="ValueError: no such number"):
        worker.ask({"raise": "no such number"})
    assert worker.ask({"answer": 7}) == 7 and process_of_worker() == first


def test_what_a_worker_prints_is_no_answer(worker):
    assert worker.ask({"print": '{"answer": 8}\n', "answer": 7}) == 7


def test_an_endless_request_costs_its_cpu_limit_and_nothing_of_the_next(worker, process_of_worker):
    """The children's CPU seconds are those that the kernel counted when the dead worker was waited for."""
    worker.ask({})
    first = process_of_worker()
    before = os.times()
    with pytest.raises(WorkerFault, match="CPU"):
        worker.ask({"power": ENDLESS})
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used >= 0.8 * CPU_LIMIT_S  # it is counted in ticks
    assert worker.ask({"answer": 7}) == 7 and process_of_worker() != first


def test_the_limit_is_of_one_request_and_not_of_the_worker(worker, process_of_worker):
    worker.ask({})
    first = process_of_worker()
    while sum(first.cpu_times()[:2]) < 2 * CPU_LIMIT_S:
        worker.ask({"power": 200_000})
    assert process_of_worker() == first


def test_time_that_a_worker_waits_for_the_machine_is_not_counted(worker, process_of_worker):
    """It is stopped in the middle for longer than its limit, as a busy machine would do to it, and still answers."""
    worker.ask({})
    process = process_of_worker()
    process.suspend()

    def resume():
        time.sleep(3 * CPU_LIMIT_S)
        process.resume()

    waiting = threading.Thread(target=resume)
    waiting.start()
    start = time.monotonic()
    assert worker.ask({"power": 100_000, "answer": 7}) == 7
    assert time.monotonic() - start >= 2 * CPU_LIMIT_S  # it did wait
    waiting.join()
    assert worker.ask({"sleep": 2 * CPU_LIMIT_S, "answer": 8}) == 8


def test_a_worker_that_sleeps_for_ever_is_ended():
    with WorkerProcess(MODULE, CPU_LIMIT_S, blocked_after_s=20.0) as patient:
        assert patient.ask({"answer": 7}) == 7
        patient._blocked_after_s = 0.2
        with pytest.raises(WorkerFault):
            patient.ask({"sleep": 1000})
        patient._blocked_after_s = 20.0
        assert patient.ask({"answer": 7}) == 7


def test_a_worker_cannot_take_the_memory_of_the_host(worker, process_of_worker):
    with pytest.raises(WorkerFault, match="MemoryError"):
        worker.ask({"allocate": 5 * 2**30})
    assert process_of_worker().rlimit(psutil.RLIMIT_AS) == (4 * 2**30, 4 * 2**30)
    assert worker.ask({"answer": 7}) == 7


def test_a_worker_that_ends_over_a_request_is_a_fault_and_is_replaced(worker):
    with pytest.raises(WorkerFault):
        worker.ask({"exit": 0})
    assert worker.ask({"answer": 7}) == 7


def test_a_worker_killed_between_two_requests_costs_neither(worker, process_of_worker):
    assert worker.ask({"answer": 7}) == 7
    process = process_of_worker()
    process.kill()
    while process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert worker.ask({"answer": 7}) == 7


def test_a_signal_meant_for_the_trainer_leaves_the_worker_alone(worker, process_of_worker):
    worker.ask({})
    process = process_of_worker()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        process.send_signal(number)
    assert worker.ask({"answer": 7}) == 7 and process_of_worker() == process


def test_a_signal_while_a_worker_starts_leaves_it_alone(worker):
    """Slurm and terminals send it to all processes of a run."""
    before, signalled = set(psutil.Process().children()), threading.Event()

    def signal_at_once():
        while not (new := set(psutil.Process().children()) - before):
            pass
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            new.copy().pop().send_signal(number)
        signalled.set()

    watching = threading.Thread(target=signal_at_once)
    watching.start()
    assert worker.ask({"answer": 7}) == 7
    watching.join()
    assert signalled.is_set() and worker.ask({"answer": 8}) == 8


def test_a_worker_at_work_does_not_outlive_a_killed_parent():
    script = (
        "from nemo_jepo.rewards.process import WorkerProcess\n"
        f"worker = WorkerProcess({MODULE!r}, 1.0)\n"
        "worker.ask({})\n"
        "print('working', flush=True)\n"
        f"worker.ask({{'power': {ENDLESS}}})\n"
    )
    root = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=root)
    assert parent.stdout.readline() == "working\n"
    (process,) = psutil.Process(parent.pid).children()
    parent.kill()
    parent.communicate()
    psutil.wait_procs([process], timeout=60)
    assert not process.is_running()


def test_a_worker_that_cannot_start_is_an_error():
    with WorkerProcess("tests.support.no_such_worker", CPU_LIMIT_S) as missing:
        with pytest.raises(RuntimeError, match="no_such_worker ended with code 1"):
            missing.ask({})


def test_a_limit_must_be_positive():
    with pytest.raises(ValueError, match="cpu_limit_s"):
        WorkerProcess(MODULE, 0)
