"""Write a weight stream as a Hugging Face folder, one tensor at a time, whole or not at all.

safetensors' own writer takes a file's tensors all at once. Here a file's header is written first, which is possible
because names, shapes and dtype are known before the first tensor arrives, and the bytes follow as they come.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from nemo_jepo.actor.weights.checksums import CHECKSUMS
from nemo_jepo.actor.weights.hf_folder import INDEX
from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.hub import COMPANIONS
from nemo_jepo.utils.files import sha256_of

Shapes = Mapping[str, tuple[int, ...]]
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def copy_companions(source: Path, folder: Path) -> None:
    """The files beside the weights, byte by byte, into another folder."""
    for name in COMPANIONS:
        if (source / name).is_file():
            (folder / name).write_bytes((source / name).read_bytes())


def export_hf(
    stream: Iterable[tuple[str, Tensor]],
    shapes: Shapes,
    dtype: torch.dtype,
    folder: Path,
    companions: Path,
    shard_bytes: int = 1 << 30,
) -> None:
    """Write a stream as a new Hugging Face folder, which appears under its name when it is whole and on the disk.

    Args:
        shapes: what the stream will give, in its order.
        companions: folder with config.json, tokenizer and the like, which are copied.
        shard_bytes: data of one file; a larger tensor has a file of its own.
    Raises:
        FileExistsError: the folder exists.
        ConfigError: the disk does not take a tensor; names the tensor and the file. Or the folder cannot be made.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; export writes new folders only")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed export
    try:
        partial.mkdir(parents=True)
        plan = _plan(shapes, dtype, shard_bytes)
        tensors = iter(stream)
        checksums = {
            file: _write_file(partial / file, tensors, {name: shapes[name] for name in names}, dtype)
            for file, names in plan.items()
        }
        assert next(tensors, None) is None, "the stream gave more than was planned"
        copy_companions(companions, partial)
        if len(plan) > 1:
            index = {
                "metadata": {"total_size": sum(_size(shape, dtype) for shape in shapes.values())},
                "weight_map": {name: file for file, names in plan.items() for name in names},
            }
            (partial / INDEX).write_text(json.dumps(index, indent=2))
        checksums |= {file.name: sha256_of(file) for file in partial.iterdir() if file.name not in checksums}
        (partial / CHECKSUMS).write_text(json.dumps(checksums, indent=1, sort_keys=True))
        _to_disk(*partial.iterdir(), partial)
        os.rename(partial, folder)
        _to_disk(folder.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise _unwritten(folder, f"cannot be written ({error})") from error
        raise


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _plan(shapes: Shapes, dtype: torch.dtype, shard_bytes: int) -> dict[str, list[str]]:
    """File name -> its tensors, in the stream's order."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        size = _size(shape, dtype)
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards)}


def _write_file(file: Path, stream: Iterator[tuple[str, Tensor]], shapes: Shapes, dtype: torch.dtype) -> str:
    """Write one safetensors file with the next tensors of the stream; returns its SHA-256.

    Format: header length (8 bytes, little-endian), header (JSON, padded with spaces to 8 bytes), data in one piece.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + _size(shape, dtype)
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    writing, digest = "__metadata__", hashlib.sha256()
    try:
        with file.open("wb", buffering=0) as data:
            _write_all(data, memoryview(len(text).to_bytes(8, "little") + text), digest)
            for writing, shape in shapes.items():
                name, tensor = next(stream)
                assert (name, tensor.shape, tensor.dtype) == (writing, shape, dtype), f"{name} for {writing}"
                _write_all(data, tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data, digest)
                del tensor  # before the stream makes the next one
    except OSError as error:
        raise _unwritten(file, f"tensor {writing} cannot be written ({error})") from error
    return digest.hexdigest()


def _write_all(data: FileIO, rest: memoryview, digest: "hashlib._Hash") -> None:
    """An unbuffered write may take a part only; a full disk shows at the tensor that does not fit."""
    digest.update(rest)
    while rest:
        rest = rest[data.write(rest) :]


def _to_disk(*paths: Path) -> None:
    """Return once the disk holds the files and folders."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            raise _unwritten(path, f"cannot be written ({error})") from error
        finally:
            os.close(descriptor)


def _unwritten(path: Path, rule: str) -> ConfigError:
    return ConfigError("HF_DIR", str(path), rule, "Make room on that disk, or export to another one")
