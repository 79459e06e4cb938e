"""What import and export do, in the layout of the ranks that run it."""

from pathlib import Path

from nemo_jepo.checkpoint.convert import export_hf_folder, import_hf


def imported(folder: Path, checkpoint: Path, overrides: list[str]) -> None:
    import_hf(folder, checkpoint, overrides)


def exported(checkpoint: Path, folder: Path, overrides: list[str]) -> None:
    export_hf_folder(checkpoint, folder, overrides)
