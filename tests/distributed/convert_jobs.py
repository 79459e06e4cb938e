"""What import and export do, in the layout of the ranks that run it."""

from pathlib import Path

from nemo_jepo.checkpoint.convert import export_hf_folder, import_hf


def imported(folder: Path, checkpoint: Path, overrides: list[str]) -> None:
    assert import_hf(folder, checkpoint, overrides) == 0


def exported(checkpoint: Path, folder: Path, overrides: list[str]) -> None:
    assert export_hf_folder(checkpoint, folder, overrides) == 0
