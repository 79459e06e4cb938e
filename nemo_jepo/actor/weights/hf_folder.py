"""The safetensors files of a Hugging Face folder, checked before anything is read and then read by slices."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_jepo.config.errors import ConfigError

INDEX = "model.safetensors.index.json"
KEY = "pretrained_checkpoint.restore_from_path"
_COPY_AGAIN = "Copy the file again"
_DTYPES = ("F32", "BF16", "F16")
# Buffers that old releases of transformers wrote beside the weights.
_BUFFERS = ("rotary_emb.inv_freq", "self_attn.bias", "self_attn.masked_bias")


@dataclass(frozen=True, slots=True)
class _Found:
    """Where a tensor lies and what its file's header says of it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class SafetensorsFolder:
    """Slices of the tensors in a Hugging Face folder: model.safetensors, or shards with an index.

    A file is mapped only while one slice of it is read, so the host holds no more than that slice.
    """

    def __init__(self, folder: str | Path) -> None:
        """Read every file's header.

        Raises:
            ConfigError: no safetensors files, or one that is missing, cut off or not one at all.
        """
        self._folder = Path(folder)
        index = self._folder / INDEX
        self._listed = _read_index(index) if index.exists() else {}
        files = sorted(set(self._listed.values())) or sorted(self._folder.glob("*.safetensors"))
        if not files:
            raise ConfigError(KEY, str(folder), "holds no *.safetensors", "Convert the weights")
        self._found: dict[str, _Found] = {}
        for file in files:
            self._found |= _read_header(file, [name for name, where in self._listed.items() if where == file])

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Every tensor is there with its shape, and no other but known buffers and a tied head's copy.

        Raises:
            ConfigError: names the first tensor that is missing, misshaped or unknown, and its file.
        """
        for name, shape in shapes.items():
            found = self._found.get(name)
            if found is None:
                file = self._listed.get(name, self._folder / INDEX if self._listed else self._folder)
                raise _fault(file, name, "is missing", "Check config.json, and that the folder is complete")
            if found.shape != shape:
                rule = f"has shape {found.shape}, config.json asks for {shape}"
                raise _fault(found.file, name, rule, "Check config.json")
            if found.dtype not in _DTYPES:
                rule = f"has dtype {found.dtype}, which is not one of {', '.join(_DTYPES)}"
                raise _fault(found.file, name, rule, "Give the weights before quantisation")
        for name, found in self._found.items():
            if name not in shapes and not name.endswith((*_BUFFERS, "lm_head.weight")):
                raise _fault(found.file, name, "is not part of this architecture", "Check config.json")

    @property
    def dtype(self) -> torch.dtype:
        """What holds every tensor exactly: bf16 where all are bf16, else fp32."""
        return torch.bfloat16 if all(found.dtype == "BF16" for found in self._found.values()) else torch.float32

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """The whole tensor, or tensor[start:stop] along dim; backed by the mapped file until it is dropped."""
        file = self._found[name].file
        try:
            with safe_open(file, framework="pt") as tensors:
                part = tensors.get_slice(name)
                return part[:] if dim is None else part[start:stop] if dim == 0 else part[:, start:stop]
        except (OSError, SafetensorError) as error:
            raise _fault(file, name, f"cannot be read ({error})", _COPY_AGAIN) from error


def _fault(file: Path, name: str, rule: str, fix: str) -> ConfigError:
    return ConfigError(KEY, str(file), f"tensor {name} {rule}", fix)


def _read_index(index: Path) -> dict[str, Path]:
    """Tensor -> file, as the index lists them."""
    try:
        return {name: index.parent / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(KEY, str(index), f"cannot be read ({error!r})", _COPY_AGAIN) from error


def _read_header(file: Path, listed: Iterable[str]) -> dict[str, _Found]:
    """Every tensor of a file by its header; `listed` is what the index says is in it."""
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {name: _Found(file, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        lost = _first_cut_tensor(file) or next(iter(listed), None)
        rule = f"cannot be read ({error})" if file.exists() else "is missing"
        if lost is not None:
            raise _fault(file, lost, f"is lost: the file {rule}", _COPY_AGAIN) from error
        raise ConfigError(KEY, str(file), rule, _COPY_AGAIN) from error


def _first_cut_tensor(file: Path) -> str | None:
    """The first tensor whose bytes reach beyond the file's end; None where even the header cannot be read."""
    try:
        with file.open("rb") as data:
            length = int.from_bytes(data.read(8), "little")
            header = json.loads(data.read(min(length, file.stat().st_size)))
        header.pop("__metadata__", None)
        held = file.stat().st_size - 8 - length
        cut = [(entry["data_offsets"][0], name) for name, entry in header.items() if entry["data_offsets"][1] > held]
        return min(cut)[1] if cut else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
