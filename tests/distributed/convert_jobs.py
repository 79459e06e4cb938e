"""What import and export do, in the layout of the ranks that run it."""

from pathlib import Path
from unittest import mock

from nemo_jepo.checkpoint.convert import export_hf_folder, import_hf


def imported(folder: Path, checkpoint: Path, overrides: list[str]) -> None:
    import_hf(folder, checkpoint, overrides)


def exported(checkpoint: Path, folder: Path, overrides: list[str]) -> None:
    export_hf_folder(checkpoint, folder, overrides)


def imported_by_name(folder: Path, checkpoint: Path) -> int:
    """From a hub that has the folder under every name; how often this rank asked it."""
    with mock.patch("huggingface_hub.snapshot_download", return_value=str(folder)) as hub:
        import_hf(Path("lab/tiny"), checkpoint)
    return hub.call_count
