"""Where the files of conf/ are, in a checkout and in an installed package."""

from pathlib import Path


def conf_dir() -> Path:
    """The folder of conf files: inside the installed package, else at the top of the checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def shipped_examples() -> dict[str, Path]:
    """The files of solved examples that data.examples knows by name."""
    return {path.stem: path for path in sorted((conf_dir() / "examples").glob("*.jsonl"))}


def examples_file(path_or_name: str) -> Path:
    """The file that data.examples means: a shipped one by its name, else the path itself."""
    return shipped_examples().get(path_or_name, Path(path_or_name))
