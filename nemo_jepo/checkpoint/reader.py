"""Read a checkpoint: nothing in it is executed, and what a rank reads has the bytes that were written.

Megatron reads a torch_dist checkpoint with pickle in two places: .metadata, which lists every shard, and the shards
that are no tensors. Here a pickle may name the few classes of torch's own metadata, or what torch.load(weights_only)
allows, and nothing else. While a file is read, its SHA-256 is computed beside it (checkpoint.verify_on_load).
"""

import io
import json
import pathlib
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import torch as megatron_torch
from megatron.core.dist_checkpointing.strategies.base import LoadCommonStrategy
from torch.distributed.checkpoint import FileSystemReader, filesystem, metadata, planner
from torch.distributed.checkpoint._nested_dict import set_element  # what torch's own planner ends with
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem

from nemo_jepo.actor.parallel import on_every_rank
from nemo_jepo.checkpoint.format import Marker, require_whole
from nemo_jepo.config.errors import ConfigError, SettingsError
from nemo_jepo.config.reading import reason
from nemo_jepo.utils.files import OTHER_BYTES, hashing_threads, sha256_of

METADATA = ".metadata"
OFTEN_READ = (METADATA, "metadata.json", "common.pt", "loop.json")
"""Small files that every rank reads."""
EXTRA_STATE = "_extra_state"
KNOWN = {
    (known.__module__, known.__qualname__): known
    for known in (
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.TensorStorageMetadata,
        metadata.TensorProperties,
        metadata._MEM_FORMAT_ENCODING,
        planner.SavePlan,
        planner.WriteItem,
        planner.WriteItemType,
        planner.TensorWriteData,
        planner.BytesIOWriteData,
        filesystem._StorageInfo,
        torch.serialization._get_layout,
        pathlib.PosixPath,
    )
}
"""Every class and function that .metadata may name, but torch.Size and the dtypes."""


class _MetadataUnpickler(pickle.Unpickler):
    """Reads .metadata; whatever is not torch's own metadata is refused by name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        if module == "torch" and (name == "Size" or isinstance(vars(torch).get(name), torch.dtype)):
            return vars(torch)[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of this program does")


# ---- which files, and their checksums -------------------------------------------------------------------------


class Checked:
    """A whole checkpoint, its files and their checksums.

    Args:
        verify: which files this rank compares with the checksums they were written with: own (those that it reads), all
            (every rank a share of all files, beside its own) or none.
    Raises:
        ConfigError: the checkpoint is not whole.
    """

    def __init__(self, path: Path, verify: str) -> None:
        self.path = path
        self.verify = verify
        self._marker: Marker = require_whole(path)
        self._compared: set[str] = set()

    @contextmanager
    def compared(self, names: Iterable[str]) -> Iterator[None]:
        """Read these files in the block, while threads compute the checksums of those not compared before.

        Raises:
            SettingsError: a file is not of this checkpoint; its bytes are others, whatever the block says of them; the
                block could not read them.
        """
        names = list(names)
        for name in names:
            if name not in self._marker.sizes:
                raise self._fault(f"{name} is not among the files that it lists")
        checksums = self._marker.checksums if self.verify != "none" else {}
        expected = {name: checksums[name] for name in names if name in checksums and name not in self._compared}
        with hashing_threads() as threads:
            found = {name: threads.submit(sha256_of, self.path / name) for name in expected}
            try:
                yield
            except Exception as error:
                self._compare(found, expected)
                if isinstance(error, SettingsError):
                    raise
                raise self._fault(f"{', '.join(names)} cannot be read ({reason(error)})") from error
            self._compare(found, expected)

    def _compare(self, found: Mapping[str, "Future[str]"], expected: Mapping[str, str]) -> None:
        for name, checksum in found.items():
            try:
                same = checksum.result() == expected[name]
            except OSError as error:
                raise self._fault(f"{name} cannot be read ({reason(error)})") from error
            self._compared.add(name)
            if not same:
                raise self._fault(f"{name} {OTHER_BYTES}")

    def _fault(self, rule: str) -> SettingsError:
        """An error that may travel between ranks."""
        fix = "Put the file back, or move this checkpoint away: the one before it is then the newest"
        return SettingsError(str(ConfigError("checkpoint", str(self.path), rule, fix)))

    def shared_names(self) -> list[str]:
        """The files that this rank compares without reading their shards: all small ones, and a share with `all`."""
        rank, size = dist.get_rank(), dist.get_world_size()
        small = [name for name in sorted(self._marker.sizes) if not name.endswith(".distcp")]
        large = [name for name in sorted(self._marker.sizes) if name.endswith(".distcp")]
        names = small if rank == 0 else [name for name in small if name in OFTEN_READ]
        return names + (large[rank::size] if self.verify == "all" else [])


# ---- Megatron's reader, without what it would execute ---------------------------------------------------------


class _Reader(FileSystemReader):
    """Reads the shards of a plan, and compares the files that they lie in."""

    def __init__(self, checked: Checked, found: Metadata) -> None:
        super().__init__(checked.path)
        self._checked, self._metadata = checked, found
        found.storage_meta = found.storage_meta or metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> "torch.futures.Future[None]":
        files = {self.storage_data[item.storage_index].relative_path for item in plan.items}
        with self._checked.compared(sorted(files)):
            return super().read_data(plan, planner)


def _plain(source: Path | io.BytesIO) -> Any:
    """What torch.save wrote: tensors and plain data, nothing that is executed."""
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # pages of advice, how to execute it among them
        named = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it names {named[1]}, which no checkpoint of this program does" if named else "it is no plain data"
        raise pickle.UnpicklingError(why) from None


class _Planner(megatron_torch.MCoreLoadPlanner):
    """Megatron's planner; a shard that is no tensor is read without executing it."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        set_element(self.original_state_dict, self.mappings[name], _plain(value))


class _Shards(megatron_torch.TorchDistLoadShardedStrategy):
    """Megatron's reader of torch_dist shards, which makes its two helpers itself."""

    def __init__(self, checked: Checked, found: Metadata) -> None:
        super().__init__()
        self._checked, self._metadata = checked, found

    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> dict[str, Any]:
        reader = _Reader(self._checked, self._metadata)
        with _exchanged(_get_filesystem_reader=lambda *_, **__: reader, MCoreLoadPlanner=_Planner):
            return super().load(sharded_state_dict, checkpoint_dir)


@contextmanager
def _exchanged(**others: Any) -> Iterator[None]:
    """Names of Megatron's module with another meaning."""
    originals = {name: getattr(megatron_torch, name) for name in others}
    try:
        for name, other in others.items():
            setattr(megatron_torch, name, other)
        yield
    finally:
        for name, original in originals.items():
            setattr(megatron_torch, name, original)


class _Common(LoadCommonStrategy):
    """common.pt, which every rank reads as a whole."""

    def __init__(self, checked: Checked) -> None:
        self._checked = checked

    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        with self._checked.compared(["common.pt"]):
            return _plain(self._checked.path / "common.pt")

    def load_sharded_objects(self, sharded_objects_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> Any:
        raise AssertionError("torch_dist holds them in its shards")

    def check_backend_compatibility(self, loaded_version: int) -> None: ...

    def check_version_compatibility(self, loaded_version: int) -> None: ...


# ---- what others call -----------------------------------------------------------------------------------------


def read_metadata(checked: Checked) -> Metadata:
    """What .metadata says: names, shapes, dtypes and places of all shards.

    Raises:
        SettingsError: its bytes are others; it names what is not metadata; it is no metadata at all.
    """
    with checked.compared([METADATA]):
        found = _MetadataUnpickler(io.BytesIO((checked.path / METADATA).read_bytes())).load()
        if not isinstance(found, Metadata):
            raise pickle.UnpicklingError("it holds no metadata")
    return found


def held_dtype(path: Path, name: str) -> torch.dtype:
    """The dtype of a tensor in a checkpoint."""
    held = read_metadata(Checked(path, "own")).state_dict_metadata.get(name)
    if not isinstance(held, TensorStorageMetadata):
        raise ConfigError("checkpoint", str(path), f"holds no {name}", "Use a checkpoint of this program")
    return held.properties.dtype


def load_shards(path: Path, sharded_state: dict[str, Any], verify: str = "own") -> dict[str, Any]:
    """The state with its tensors filled in, in the current layout, whatever layout wrote it. All ranks.

    Nothing of Transformer Engine's extra state is read: it would be unpickled, and no recipe of ours needs it.

    Args:
        path: a checkpoint folder.
        sharded_state: shards of the state to fill; parts of a checkpoint that it leaves out are not read.
        verify: checkpoint.verify_on_load; see `Checked`.
    Raises:
        ConfigError: on every rank, where the checkpoint is not whole, a file that any rank reads has other bytes than
            when it was written, or one cannot be read; names the file.
    """
    checked, found = Checked(path, verify), []
    on_every_rank(lambda: found.append(_read_small_files(checked)))
    try:
        wanted = _without_extra_state(sharded_state)
        return dist_checkpointing.load(wanted, str(path), _Shards(checked, found[0]), _Common(checked))
    except CheckpointException as error:  # torch gathers what went wrong on any rank
        first, _ = next(iter(error.failures.values()))
        raise _as_line(path, first) from error
    except Exception as error:  # what .metadata says may lead anywhere in torch and Megatron
        raise _as_line(path, error) from error


def _read_small_files(checked: Checked) -> Metadata:
    """What .metadata says; the other small files are as they were written, and with `all` this rank's share of all."""
    with checked.compared(checked.shared_names()):
        json.loads((checked.path / "metadata.json").read_text())
        json.loads((checked.path / "loop.json").read_text())
        return read_metadata(checked)


def _as_line(path: Path, error: BaseException) -> ConfigError:
    if isinstance(error, ConfigError):
        return SettingsError(str(error))
    rule = f"cannot be loaded ({reason(error)})"
    return ConfigError("checkpoint", str(path), rule, "Use a checkpoint of this model, and this program")


def _without_extra_state(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_extra_state(value) if isinstance(value, dict) else value
        for name, value in state.items()
        if not (isinstance(value, ShardedObject) and value.key.endswith(EXTRA_STATE))
    }
