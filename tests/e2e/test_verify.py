"""The verifier: which answers are equal, and that no answer can hang or crash a run."""

import os
from collections.abc import Callable, Iterator

import psutil
import pytest

from nemo_jepo.rewards.verify import Verifier

pytestmark = pytest.mark.quick


ENDLESS = "9^{9^{9^{9}}}"
CPU_LIMIT_S = 2.0


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(CPU_LIMIT_S) as shared:
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
    with Verifier(CPU_LIMIT_S) as verifier:
        assert verifier.verify([(" The  Nile\n", "the nile"), (ENDLESS, ENDLESS), (" ", "7")]) == [True, True, False]
        assert own_workers() == set()


def test_an_endless_answer_is_a_fault_and_its_neighbours_are_judged(own_workers):
    with Verifier(CPU_LIMIT_S) as verifier:
        verifier.verify([("1", "2")])
        (stuck,) = own_workers()
        assert verifier.verify([("7", "7.0"), (ENDLESS, "7"), ("7.5", "15/2"), ("8", "7")]) == [True, None, True, False]
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
