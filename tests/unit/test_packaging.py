"""Nothing is left out of the package, and constraints.txt has a version for everything that it needs."""

import tomllib
from fnmatch import fnmatch
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "nemo_jepo"


def packaging() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_file_beside_the_code_is_packaged():
    patterns = packaging()["package-data"]
    for path in (path for path in PACKAGE.rglob("*.*") if path.suffix not in (".py", ".pyc")):
        package = ".".join(path.parent.relative_to(ROOT).parts)
        assert any(fnmatch(path.name, pattern) for pattern in [*patterns["*"], *patterns.get(package, [])]), path


def test_every_folder_of_code_and_conf_is_packaged():
    packages = packaging()["packages"]
    code = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("*.py")}
    files = (path for path in (ROOT / "conf").rglob("*") if path.suffix in (".yaml", ".jsonl"))
    conf = {".".join(("nemo_jepo", *path.parent.relative_to(ROOT).parts)) for path in files}
    assert set(packages) == code | conf


def test_constraints_meet_every_requirement():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(pin.name): pin for pin in map(Requirement, lines)}
    for line in [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]:
        asked = Requirement(line)
        if asked.name == "nemo_jepo":  # an extra that names other extras of ours
            continue
        (version,) = (item.version for item in pins[canonicalize_name(asked.name)].specifier)
        assert asked.specifier.contains(version), f"{line} against {version}: run `make lock`"
