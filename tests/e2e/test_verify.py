"""The verifier: which answers are equal, and that no answer can hang or crash a run."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from nemo_jepo.rewards.verify import Verifier
from tests.support.answer_pairs import PAIRS
from tests.support.later_answer_pairs import LATER_PAIRS

pytestmark = pytest.mark.quick


ROOT = Path(__file__).parents[2]
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


@pytest.fixture(scope="module")
def page() -> ModuleType:
    """tools/verifier_page.py."""
    spec = importlib.util.spec_from_file_location("verifier_page", ROOT / "tools" / "verifier_page.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["verifier_page"] = module
    spec.loader.exec_module(module)
    return module


def test_pairs_of_answers_are_judged_as_a_careful_reader_does(page):
    """No wrong answer is called right, and of the right ones that came before the rules three at most are refused."""
    first, later = page.judged(PAIRS), page.judged(LATER_PAIRS)
    everything = [one for verdicts in first.values() for one in verdicts]
    assert len(everything) >= 120
    positive, negative = page.errors(everything, "ours")
    assert positive == 0 and negative <= 3
    assert page.errors(everything, "alone") > (20, 20)  # or the rules are for nothing
    assert all(page.errors(verdicts, "ours")[0] == 0 for verdicts in later.values())
    written = (ROOT / "docs" / "reference" / "verifier.md").read_text()
    assert page.page(first, later) == written, "run `make reference`"


@pytest.mark.parametrize(
    ("own", "reference", "right"),
    [
        (r"1.0 \times 10^{-20}", r"2.0 \times 10^{-20}", False),
        (r"66.3 \times 10^{-35}", r"6.63 \times 10^{-34}", True),
        ("0.0", "10^{-7}", False),
        ("0.0000001", "10^{-7}", True),
        ("7" * 5000, "7", False),
        (r"\frac{", "7", False),
    ],
)
def test_small_and_large_numbers_are_compared_without_rounding(verifier, own, reference, right):
    assert verifier.verify([(own, reference)]) == [right]


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
