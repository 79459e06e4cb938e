"""Nothing is left out of the package."""

import tomllib
from fnmatch import fnmatch
from pathlib import Path

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
    conf = {".".join(("nemo_jepo", *path.parent.relative_to(ROOT).parts)) for path in (ROOT / "conf").rglob("*.yaml")}
    assert set(packages) == code | conf
