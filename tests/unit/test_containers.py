"""The images' versions agree with the project's, and so does what the guide installs on an NGC image."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nemo_jepo.tools.doctor.versions import SUPPORTED
from tests.support.command_line import ROOT

FOLDER = ROOT / "containers"
GPU, CPU = FOLDER / "Dockerfile", FOLDER / "cpu.Dockerfile"
ON_NGC, GUIDE = FOLDER / "ngc.txt", ROOT / "docs" / "guides" / "ngc.md"

PACKAGES = {
    "TORCH_VERSION": "torch",
    "VLLM_VERSION": "vllm",
    "MEGATRON_CORE_VERSION": "megatron-core",
    "TRANSFORMER_ENGINE_VERSION": "transformer_engine",
    "NEMO_TOOLKIT_VERSION": "nemo_toolkit",
    "WANDB_VERSION": "wandb",
    "PIP_VERSION": "pip",
    "SETUPTOOLS_VERSION": "setuptools",
    "NINJA_VERSION": "ninja",
    "PYBIND11_VERSION": "pybind11",
}


def arguments(dockerfile: Path) -> dict[str, str]:
    """ARG NAME=VALUE above the first FROM."""
    above = dockerfile.read_text().partition("\nFROM ")[0]
    return dict(re.findall(r"^ARG (\w+)=(\S+)$", above, re.MULTILINE))


def dependencies() -> list[str]:
    """Those of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def project_pins() -> dict[str, str]:
    """name: version of the dependencies that pyproject.toml pins exactly."""
    pins = (re.fullmatch(r"([\w-]+)(?:\[.*\])?==(\S+)", line) for line in dependencies())
    return {pin[1]: pin[2] for pin in pins if pin}


def test_the_image_has_the_versions_that_the_project_pins():
    versions, pins = arguments(GPU), project_pins()
    shared = {name: package for name, package in PACKAGES.items() if package in pins}
    assert set(shared) == {"TORCH_VERSION", "MEGATRON_CORE_VERSION", "NEMO_TOOLKIT_VERSION"}
    assert {name: versions[name] for name in shared} == {name: pins[package] for name, package in shared.items()}


def test_the_image_has_the_vllm_that_make_vllm_installs_and_serve_accepts():
    makefile = re.search(r"^VLLM := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert makefile is not None and arguments(GPU)["VLLM_VERSION"] == makefile[1]
    assert makefile[1].startswith("0.32.")


def test_the_image_has_the_transformer_engine_that_make_te_stub_fetches():
    makefile = re.search(r"^TRANSFORMER_ENGINE := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert makefile is not None and arguments(GPU)["TRANSFORMER_ENGINE_VERSION"] == makefile[1]


@pytest.mark.parametrize("dockerfile", [GPU, CPU], ids=lambda path: path.name)
def test_every_version_stands_at_the_top_and_the_image_is_not_root_and_ends_with_an_import_check(dockerfile):
    above, _, below = dockerfile.read_text().partition("\nFROM ")
    assert below.startswith("${BASE_IMAGE}")
    assert not re.search(r"==\d|:latest", below)
    assert set(re.findall(r"^ARG (\w+)$", below, re.MULTILINE)) == set(arguments(dockerfile)) - {"BASE_IMAGE"}
    instructions = re.findall(r"^(FROM|USER|RUN|CMD)\b(.*)", below, re.MULTILINE)
    users = [rest.strip() for name, rest in instructions if name == "USER"]
    assert users == ["1001"]
    last_run = below.rpartition("\nRUN ")[2]
    assert "import" in last_run and "nemo_jepo.cli" in last_run
    assert dockerfile == CPU or "cudnn_folders" in last_run
    assert below.index("\nUSER") < below.rindex("\nRUN ")
    assert "docker run" in above and "enroot import" in above


def test_the_base_image_has_the_cuda_that_torch_was_built_for():
    """torch 2.13.0 from PyPI is built for CUDA 13.0; the check inside the image says the same number."""
    text = GPU.read_text()
    base = re.search(r"-cuda(\d+\.\d+)-devel", arguments(GPU)["BASE_IMAGE"])
    checked = re.search(r"torch\.version\.cuda\.startswith\('(\S+)'\)", text)
    assert base is not None and checked is not None and base[1] == checked[1]
    assert f"transformer_engine_cu{base[1].partition('.')[0]}" in text


def needed(line: str) -> set[str]:
    """Every package that a requirement brings, by the metadata of what is installed here."""
    found, waiting = set(), [Requirement(line)]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        if name in found:
            continue
        found.add(name)
        extras = wanted.extras or {""}
        below = map(Requirement, metadata.requires(name) or ())
        waiting += [
            each for each in below if each.marker is None or any(each.marker.evaluate({"extra": e}) for e in extras)
        ]
    return found


def test_what_the_guide_installs_on_an_ngc_image_is_all_that_does_not_ask_for_torch():
    """The rest is torch itself and what is installed with --no-deps; so pip has no reason to replace the image's."""
    listed = [line for line in ON_NGC.read_text().splitlines() if not line.startswith("#")]
    assert listed == [line for line in dependencies() if "torch" not in needed(line)]
    left_out = {Requirement(line).name for line in dependencies() if line not in listed}
    assert left_out == {"torch", "megatron-core", "nemo_toolkit"}


def test_the_guide_pins_what_the_project_pins_and_names_every_range_of_the_doctor():
    guide, pins = GUIDE.read_text(), project_pins()
    pinned = set(re.findall(r"\b(torch|megatron-core|nemo_toolkit)==([\w.]+)", guide))
    assert pinned == {(name, pins[name]) for name in ("megatron-core", "nemo_toolkit")}
    assert f"containers/{ON_NGC.name}" in guide
    for supported in SUPPORTED:
        assert f"`{supported.versions}`" in guide
