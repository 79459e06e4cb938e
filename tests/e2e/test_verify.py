"""The verifier: which answers are equal, and that no answer can hang or crash a run."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from nemo_jepo.rewards.verify import Verifier

pytestmark = pytest.mark.quick


ENDLESS = "9^{9^{9^{9}}}"
TIMEOUT_S = 2.0


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(TIMEOUT_S) as shared:
        yield shared


def workers_of(pid: int) -> set[psutil.Process]:
    return set(psutil.Process(pid).children())


@pytest.fixture
def own_workers() -> Callable[[], set[psutil.Process]]:
    """Workers started since the test began (the shared verifier has one too)."""
    pid = os.getpid()
    before = workers_of(pid)
    return lambda: workers_of(pid) - before


@pytest.mark.parametrize(
    ("own", "reference"),
    [
        ("7", "7.0"),
        (r"\frac{1}{2}", "0.5"),
        ("x+1", "1+x"),
        ("$x+1$", "1+x"),
        (r"2\sqrt{2}", r"\sqrt{8}"),
        ("1,000", "1000"),
        ("7 apples", "7"),
        ("$18.", "18"),
        ("(1,2)", "(1, 2)"),
        (r"\{1,2\}", r"\{2,1\}"),
    ],
)
def test_equal_answers_are_equal_however_they_are_written(verifier, own, reference):
    assert verifier.verify([(own, reference)]) == [True]


@pytest.mark.parametrize(
    ("own", "reference"),
    [("-3", "3"), ("2x", "2"), ("x+1", "x+2"), ("7 or 8", "8"), (r"\frac{", "7"), ("Paris", "Rome"), ("7" * 5000, "7")],
)
def test_other_answers_are_wrong_and_no_fault(verifier, own, reference):
    assert verifier.verify([(own, reference)]) == [False]


def test_folded_text_needs_no_worker(own_workers):
    with Verifier(TIMEOUT_S) as verifier:
        assert verifier.verify([(" The  Nile\n", "the nile"), (ENDLESS, ENDLESS), (" ", "7")]) == [True, True, False]
        assert own_workers() == set()


def test_an_endless_answer_is_a_fault_and_its_neighbours_are_judged(own_workers):
    with Verifier(TIMEOUT_S) as verifier:
        verifier.verify([("1", "2")])
        (stuck,) = own_workers()
        start = time.monotonic()
        assert verifier.verify([("7", "7.0"), (ENDLESS, "7"), ("7.5", "15/2"), ("8", "7")]) == [True, None, True, False]
        assert time.monotonic() - start >= TIMEOUT_S
        assert stuck not in own_workers() and len(own_workers()) == 1


HOSTILE = {
    "factorial": "(10^9)!",
    "endless sum": r"\sum_{n=1}^{10^{12}} \frac{1}{n}",
    "nested fractions": r"\frac{1}{" * 300 + "2" + "}" * 300,
    "nested braces": "{" * 5000 + "7" + "}" * 5000,
    "expansion": "(x+y+z)^{400}",
    "long set": r"\{" + ",".join(map(str, range(3000))) + r"\}",
}


@pytest.mark.parametrize("own", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_latex_is_never_right_and_never_the_end(own):
    """None of them equals 8; that a library may lose its time or its stack over one is a fault."""
    with Verifier(0.5) as hasty:
        assert hasty.verify([(own, "8")])[0] is not True


NONSENSE = {
    "a request of its own": '"}\n{"own": "8", "reference": "8", "timeout_s": 1}\n',
    "half a character": "\ud800",
    "nothing to see": "\u200b",
    "dollars": "$" * 10_001,
    "every box but the right one": r"\boxed{1}\boxed{2}\boxed{3}",
    "every number": "1, 2, 3, 4, 5, 6, 7, 8",
    "every real number": r"(-\infty, \infty)",
    "a tolerance": r"7 \pm 100",
    "NaN": "NaN",
    "0/0": r"\frac{0}{0}",
}


@pytest.mark.parametrize("own", NONSENSE.values(), ids=NONSENSE.keys())
def test_nonsense_is_wrong(verifier, own):
    assert verifier.verify([(own, "8"), ("7.5", "15/2")]) == [False, True]


@pytest.mark.parametrize("code", ["__import__('pathlib').Path({file!r}).touch()", "open({file!r}, 'w')"])
@pytest.mark.parametrize("form", ["{code}", "${code}$", "$\\text{{{code}}}$"])
def test_code_in_an_answer_is_not_run(verifier, tmp_path, code, form):
    """SymPy's own parser would."""
    own = form.format(code=code.format(file=str(tmp_path / "made")))
    assert verifier.verify([(own, "8")])[0] is not True
    assert not (tmp_path / "made").exists()


def test_a_worker_cannot_take_the_memory_of_the_host(own_workers):
    with Verifier(TIMEOUT_S) as verifier:
        verifier.verify([("1", "2")])
        (worker,) = own_workers()
        assert worker.rlimit(psutil.RLIMIT_AS) == (4 * 2**30, 4 * 2**30)


def test_a_worker_killed_from_outside_is_a_fault_and_is_replaced(own_workers):
    with Verifier(TIMEOUT_S) as verifier:
        assert verifier.verify([("7", "7.0")]) == [True]
        (worker,) = own_workers()
        worker.kill()
        worker.wait()
        assert verifier.verify([("7", "7.0"), ("7", "7.0")]) == [None, True]


def test_a_signal_meant_for_the_trainer_leaves_the_worker_alone(own_workers):
    with Verifier(TIMEOUT_S) as verifier:
        assert verifier.verify([("7", "7.0")]) == [True]
        (worker,) = own_workers()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            worker.send_signal(number)
        assert verifier.verify([("7", "7.0")]) == [True]
        assert own_workers() == {worker}


def test_close_leaves_no_process_and_the_verifier_can_be_used_again(own_workers):
    verifier = Verifier(TIMEOUT_S)
    assert verifier.verify([("7", "7.0")]) == [True]
    verifier.close()
    assert own_workers() == set()
    assert verifier.verify([("7", "7.0")]) == [True]
    verifier.close()


def test_a_hanging_worker_does_not_outlive_a_killed_parent():
    script = (
        "from nemo_jepo.rewards.verify import Verifier\n"
        f"verifier = Verifier({TIMEOUT_S})\n"
        "verifier.verify([('7', '7.0')])\n"
        "print('hanging', flush=True)\n"
        f"verifier.verify([('{ENDLESS}', '7')])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "hanging\n"
    (worker,) = workers_of(parent.pid)
    time.sleep(0.5)
    parent.kill()
    parent.communicate()
    psutil.wait_procs([worker], timeout=TIMEOUT_S + 5)
    assert not worker.is_running()


def test_a_time_limit_must_be_positive():
    with pytest.raises(ValueError, match="timeout_s"):
        Verifier(0)
