"""Hook of mkdocs: pages of the site that do not lie in docs/, and the list of decisions."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
TOP_PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Every page of docs/decisions in the navigation, by number."""
    pages = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
    (project,) = (section["Project"] for section in config.nav if "Project" in section)
    project.append({"Decisions": ["decisions/index.md", *(f"decisions/{page.name}" for page in pages)]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files of docs/ and TOP_PAGES; a link to docs/PAGE in one of these is a link to PAGE on the site."""
    for page, source in TOP_PAGES.items():
        text = (ROOT / source).read_text().replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    return files
