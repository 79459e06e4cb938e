"""The safetensors files of a Hugging Face folder, checked before anything is read and then read by slices."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from nemo_jepo.config.errors import ConfigError, shown
from nemo_jepo.config.reading import COPY_AGAIN, LARGE_FILE, library, read_json, reason, require_inside, unusable

INDEX = "model.safetensors.index.json"
KEY = "pretrained_checkpoint.restore_from_path"
MOST_HEADER_BYTES = 100_000_000
"""safetensors reads no longer header."""
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
            ConfigError: no safetensors files, or one that is missing, cut off, not one at all or not of this folder.
        """
        self._folder = Path(folder)
        index = self._folder / INDEX
        self._listed = _read_index(index) if os.path.lexists(index) else {}
        files = sorted(set(self._listed.values())) or sorted(self._folder.glob("*.safetensors"))
        if not files:
            raise ConfigError(KEY, str(folder), "holds no *.safetensors", "Convert the weights")
        self._found: dict[str, _Found] = {}
        for file in files:
            require_inside(KEY, self._folder, file)
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
        with library(KEY, str(file), f"tensor {name} cannot be read", COPY_AGAIN), safe_open(file, "pt") as tensors:
            part = tensors.get_slice(name)
            return part[:] if dim is None else part[start:stop] if dim == 0 else part[:, start:stop]


def _fault(file: Path, name: str, rule: str, fix: str) -> ConfigError:
    return ConfigError(KEY, str(file), f"tensor {name} {rule}", fix)


def _read_index(index: Path) -> dict[str, Path]:
    """Tensor -> file, as the index lists them.

    Raises:
        ConfigError: it cannot be read, or does not name files.
    """
    require_inside(KEY, index.parent, index)
    listed = read_json(KEY, index, LARGE_FILE).get("weight_map")
    if not isinstance(listed, dict):
        raise ConfigError(KEY, str(index), "cannot be read (it has no weight_map)", COPY_AGAIN)
    for name, file in listed.items():
        if not isinstance(file, str) or "\0" in file:
            raise _fault(index, name, f"lies in {shown(file)}, which is no file's name", COPY_AGAIN)
    return {name: index.parent / file for name, file in listed.items()}


def _read_header(file: Path, listed: Iterable[str]) -> dict[str, _Found]:
    """Every tensor of a file by its header, which safetensors checks; `listed` is what the index says is in it.

    Raises:
        ConfigError: names the first tensor that is lost, where one can be named.
    """
    if not os.path.lexists(file):
        raise _lost(file, next(iter(listed), None), "is missing", COPY_AGAIN)
    if (fault := unusable(file)) is not None:
        raise _lost(file, next(iter(listed), None), *fault)
    try:
        with library(KEY, str(file), "cannot be read", COPY_AGAIN), safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            found = {name: _Found(file, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except ConfigError as error:
        why = f"cannot be read ({reason(error.__cause__ or error)})"
        raise _lost(file, _first_cut_tensor(file) or next(iter(listed), None), why, COPY_AGAIN) from error
    for name, count in Counter(name for name, _ in _header_entries(file)).items():
        if count > 1:
            raise _fault(file, name, f"stands {count} times in the header", COPY_AGAIN)
    return found


def _lost(file: Path, name: str | None, rule: str, fix: str) -> ConfigError:
    """What is wrong with a file, and with the tensor that is lost by it where one is known."""
    if name is None:
        return ConfigError(KEY, str(file), rule, fix)
    return _fault(file, name, f"is lost: the file {rule}", fix)


def _header_entries(file: Path) -> list[tuple[str, Any]]:
    """(name, entry) of a file's header as they stand in it; empty where it cannot be read."""
    try:
        with file.open("rb") as data:
            length = int.from_bytes(data.read(8), "little")
            pairs = json.loads(data.read(min(length, MOST_HEADER_BYTES)), object_pairs_hook=list)
        return [(name, dict(entry)) for name, entry in pairs if name != "__metadata__"]
    except (OSError, ValueError, TypeError, RecursionError):
        return []


def _first_cut_tensor(file: Path) -> str | None:
    """The first tensor whose bytes reach beyond the file's end; None where even the header cannot be read."""
    try:
        with file.open("rb") as data:
            held = file.stat().st_size - 8 - int.from_bytes(data.read(8), "little")
        offsets = [(*entry["data_offsets"], name) for name, entry in _header_entries(file)]
        return min(((begin, name) for begin, end, name in offsets if end > held), default=(0, None))[1]
    except (OSError, ValueError, KeyError, TypeError):
        return None
