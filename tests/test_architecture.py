"""The tree keeps its shape: one-way imports, small files, plain ASCII, nothing left out of the package."""

import ast
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nemo_jepo"
SOURCES = sorted(path for folder in ("nemo_jepo", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
OTHERS = [path for pattern in ("conf/**/*.yaml", "slurm/*", "containers/*") for path in sorted(ROOT.glob(pattern))]
PLAIN_TEXT = [*SOURCES, *OTHERS, ROOT / "Makefile", ROOT / ".ci" / "run"]

SHARED = {"types", "config"}
MAY_IMPORT = {
    "types": set(),
    "rules": set(),
    "judge_config": {"rules"},
    "config": {"rules", "judge_config"},
    "json_server": set(),
    "layouts": {"config"},
    "settings": {"config", "judge_config", "layouts"},
    "objective": set(),
    "data": SHARED,
    "rollout": SHARED | {"processes", "json_server"},
    "processes": set(),
    "serve": {"config", "processes", "rules"},
    "splice": SHARED,
    "packing": SHARED,
    "actor": SHARED | {"objective"},
    "weights": SHARED,
    "checkpoint": SHARED | {"checkpoints", "processes"},
    "checkpoints": SHARED,
    "rewards": SHARED | {"json_server"},
    "tracking": SHARED,
    "metrics": SHARED,
    "plan": {"config", "layouts", "settings"},
    "experiments": {"config", "settings", "processes"},
    "report": SHARED | {"settings"},
}
JOIN_ROOMS = {
    "__init__",
    "loop",
    "rooms",
    "samplers",
    "sync",
    "evaluation",
    "second_opinions",
    "cli",
    "convert",
    "demo",
    "doctor",
}
ROOMS = sorted({path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")})


def imports(source: str) -> set[str]:
    """Dotted names that a source imports, at its top or inside a function; relative ones begin with a dot."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def imported_rooms(source: str) -> set[str]:
    return {name.split(".")[1] for name in imports(source) if name.startswith("nemo_jepo.")}


def files_of(room: str) -> list[Path]:
    return [*PACKAGE.glob(f"{room}.py"), *PACKAGE.glob(f"{room}/**/*.py")]


def test_every_form_of_import_is_seen():
    source = "import nemo_jepo.loop\nfrom nemo_jepo import data\ndef f():\n    from nemo_jepo.actor.step import x"
    assert imported_rooms(source) == {"loop", "data", "actor"}
    assert imports("from . import a\nfrom ..b import c") == {"..a", "..b.c"}


@pytest.mark.parametrize("room", ROOMS)
def test_room_imports_no_other_room(room):
    assert room in MAY_IMPORT or room in JOIN_ROOMS, (
        f"{room} is not in architecture.md: give it its place in this table"
    )
    if room in JOIN_ROOMS:
        return
    for path in files_of(room):
        extra = imported_rooms(path.read_text()) - MAY_IMPORT[room] - {room}
        assert not extra, f"{path} imports {sorted(extra)}; only {sorted(JOIN_ROOMS)} join rooms"


def test_objective_imports_only_torch_and_the_standard_library():
    allowed = sys.stdlib_module_names | {"torch", "nemo_jepo"}
    for path in files_of("objective"):
        extra = {name.split(".")[0] for name in imports(path.read_text())} - allowed
        assert not extra, f"{path} imports {sorted(extra)}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nemo_is_imported_by_cli_and_tracking_only(path):
    """Importing it takes seconds and 400 MB on every rank."""
    if path.name not in ("cli.py", "tracking.py"):
        assert "nemo" not in {name.split(".")[0] for name in imports(path.read_text())}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_is_short_and_imports_absolutely(path):
    source = path.read_text()
    limit = 150 if path == PACKAGE / "loop.py" else 600
    assert len(source.splitlines()) < limit
    assert not [name for name in imports(source) if name.startswith(".")]


@pytest.mark.parametrize("path", PLAIN_TEXT, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_is_ascii(path):
    assert path.read_text().isascii()


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
