"""A Hugging Face model becomes a checkpoint that any parallel layout loads, and a checkpoint becomes such a model.

Started as one process or under torchrun in any layout (model.* settings); a rank holds its part of the weights and one
tensor more, whichever way they go.
"""

import ctypes
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from megatron.core.tensor_parallel import layers
from transformers import PretrainedConfig

from nemo_jepo.actor import parallel
from nemo_jepo.actor.actor import DTYPES, MegatronJEPOActor
from nemo_jepo.actor.model import load_hf_config
from nemo_jepo.actor.weights.checksums import compared
from nemo_jepo.actor.weights.families import FAMILIES
from nemo_jepo.actor.weights.hf_folder import SafetensorsFolder
from nemo_jepo.actor.weights.load import hf_shapes, load_stage
from nemo_jepo.actor.weights.stream import weight_stream
from nemo_jepo.checkpoint.format import require_whole
from nemo_jepo.checkpoint.hf.export import copy_companions, export_hf
from nemo_jepo.checkpoint.hf.from_gguf import write_hf_folder
from nemo_jepo.checkpoint.hf.torch_dist import SerialSave, load_in_place
from nemo_jepo.checkpoint.reader import held_dtype
from nemo_jepo.checkpoint.writer import save_with
from nemo_jepo.config import compose
from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.hub import folder_of, is_hub_name, require_here
from nemo_jepo.config.launcher import world_size
from nemo_jepo.config.layouts import check_layout
from nemo_jepo.config.schema import Config, ModelConfig
from nemo_jepo.config.shapes import read_hf_config
from nemo_jepo.utils.exit_codes import BAD_SETTINGS, DONE

MMAP_THRESHOLD = (-3, 128 * 1024)
"""glibc's M_MMAP_THRESHOLD and its first value."""


def import_main(argv: Sequence[str]) -> int:
    """`nemo-jepo import MODEL CHECKPOINT [model.key=value ...]`."""
    usage = "usage: nemo-jepo import MODEL CHECKPOINT [model.key=value ...]\n\n"
    usage += "MODEL: a Hugging Face folder, FILE.gguf, or OWNER/NAME[@REVISION] of the Hugging Face hub"
    return _with_paths(import_hf, argv, usage)


def export_main(argv: Sequence[str]) -> int:
    """`nemo-jepo export CHECKPOINT HF_DIR [model.key=value ...]`."""
    return _with_paths(export_hf_folder, argv, "usage: nemo-jepo export CHECKPOINT HF_DIR [model.key=value ...]")


def _with_paths(work: Callable[[Path, Path, Sequence[str]], None], argv: Sequence[str], usage: str) -> int:
    """The exit code of a command that takes two folders and model.* settings."""
    if {"-h", "--help"} & set(argv):
        print(usage)
        return DONE
    if len(argv) < 2:
        print(usage, file=sys.stderr)
        return BAD_SETTINGS
    work(Path(argv[0]), Path(argv[1]), argv[2:])
    return DONE


def import_hf(source: Path, checkpoint: Path, overrides: Sequence[str] = ()) -> None:
    """Write the weights of a Hugging Face model as a new checkpoint of step 0, beside them what names the model.

    Args:
        source: a folder, a .gguf file, or owner/name[@revision] of the hub.
        overrides: model.* settings, the layout to load in (any other reads it all the same), and checkpoint.*
    Raises:
        ConfigError: what is wrong with the model or the settings, before anything is written; or the disk is full.
    """
    config = _settings(overrides)
    _require_new("CHECKPOINT", checkpoint)
    if re.fullmatch(r"step_0*[1-9]\d*", checkpoint.name):
        rule = "is the name of a run's later step, and an imported model has made none"
        raise ConfigError("CHECKPOINT", str(checkpoint), rule, "Choose another name")
    with _hf_folder(source, checkpoint) as hf_folder:
        _import_folder(hf_folder, checkpoint, config)


@contextmanager
def _hf_folder(source: Path, checkpoint: Path) -> Iterator[Path]:
    """The model as a folder: itself, one of the hub's cache, or for a while one beside the checkpoint."""
    is_gguf = source.suffix == ".gguf"
    if not is_gguf and not is_hub_name(str(source)):
        yield source
        return
    parallel.init_distributed()
    if not is_gguf:
        found = parallel.on_first_rank(partial(folder_of, "MODEL", str(source), weights=True))
        yield Path(require_here("MODEL", found))
        return
    folder = checkpoint.with_name(f".{checkpoint.name}.gguf")

    def write() -> None:
        shutil.rmtree(folder, ignore_errors=True)  # of a killed import
        write_hf_folder(source, folder)

    parallel.on_first_rank(write)
    try:
        yield folder
    finally:
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _import_folder(hf_folder: Path, checkpoint: Path, config: Config) -> None:
    hf_config = _read_config("HF_DIR", hf_folder)
    source = SafetensorsFolder(hf_folder)
    source.check(hf_shapes(hf_config))
    actor = _build_actor(hf_config, config.model, source.dtype)
    with compared(hf_folder, config.checkpoint.verify_on_load, actor.layout.rank, actor.layout.world_size):
        load_stage(actor.chunks, hf_config, source, actor.layout)
    staging = checkpoint.with_name(f".{checkpoint.name}.partial")
    with _on_disk("CHECKPOINT", staging, actor.layout):
        weights = {"model": actor.sharded_weights()}
        written = save_with(SerialSave(), staging, 0, weights, partial(copy_companions, hf_folder))
        if actor.layout.rank == 0:
            os.rename(written, checkpoint)
            shutil.rmtree(staging)
    actor.layout.barrier()


def export_hf_folder(checkpoint: Path, hf_folder: Path, overrides: Sequence[str] = ()) -> None:
    """Write a checkpoint of any layout as a new Hugging Face folder, which appears when it is whole.

    Args:
        overrides: model.* and checkpoint.* settings, the layout to read it in.
    Raises:
        ConfigError: the checkpoint is not whole, the folder exists, the disk is full.
    """
    config = _settings(overrides)
    require_whole(checkpoint)
    _require_new("HF_DIR", hf_folder)
    hf_config = _read_config("CHECKPOINT", checkpoint)
    held = held_dtype(checkpoint, "decoder.final_layernorm.weight")
    actor = _build_actor(hf_config, config.model, held)
    load_in_place(checkpoint, actor.sharded_weights(), config.checkpoint.verify_on_load)
    dtype = torch.float16 if hf_config.dtype == torch.float16 else held  # fp16 is held as fp32
    stream = _in_dtype(weight_stream(actor.chunks, hf_config, actor.layout), dtype)
    if actor.layout.rank == 0:
        export_hf(stream, hf_shapes(hf_config), dtype, hf_folder, checkpoint)
    else:
        for _ in stream:
            pass


def _settings(overrides: Sequence[str]) -> Config:
    """The settings of a command line."""
    for override in overrides:
        if not override.startswith(("model.", "checkpoint.")):
            rule = "import and export take model.* and checkpoint.* settings only"
            raise ConfigError("setting", override, rule, "Leave it out")
    return compose.resolve(compose.compose(compose.DEFAULT_CONFIG, overrides))


def _require_new(argument: str, folder: Path) -> None:
    if folder.exists():
        raise ConfigError(argument, str(folder), "exists, and only new folders are written", "Choose another name")


def _read_config(argument: str, folder: Path) -> PretrainedConfig:
    """A folder's config.json, of a supported architecture.

    Raises:
        ConfigError: there is none, or none of that kind.
    """
    file = folder / "config.json"
    family = read_hf_config(argument, file).get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        rule = f"model_type {family!r} is not supported; {', '.join(FAMILIES)} are"
        raise ConfigError(argument, str(file), rule, "Use a model of these families")
    return load_hf_config(str(file), argument)


def _in_dtype(stream: Iterator[tuple[str, torch.Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in stream:
        tensor = tensor.to(dtype)
        yield name, tensor
        del tensor  # before the stream makes the next one


def _build_actor(hf_config: PretrainedConfig, model: ModelConfig, dtype: torch.dtype) -> MegatronJEPOActor:
    """The model in the layout of the processes that were started, weights unset."""
    _give_back_freed_memory()
    model.data_parallel_size(world_size())
    check_layout(model, hf_config.to_dict())
    parallel.init_distributed()
    parallel.init_model_parallel(model)
    precision = next(name for name, known in DTYPES.items() if known == dtype)
    with _without_initialisation():
        return MegatronJEPOActor(hf_config, model, precision, parallel.Layout())


def _give_back_freed_memory() -> None:
    """Every freed tensor goes back to the system at once.

    glibc raises the threshold with what is freed, and then keeps tensors in heaps of the thread that made them; gloo
    joins shards in threads of its own, whose heaps grow to the size of the model.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # another libc has other habits
        libc.mallopt(*MMAP_THRESHOLD)


@contextmanager
def _without_initialisation() -> Iterator[None]:
    """On a CPU Megatron's layers draw every matrix as a whole, in fp32, on every rank, before they cut it."""
    names = ("_initialize_affine_weight_cpu", "_initialize_affine_weight_gpu")
    originals = {name: getattr(layers, name) for name in names}
    try:
        for name in names:
            setattr(layers, name, lambda *_, **__: None)
        yield
    finally:
        for name, original in originals.items():
            setattr(layers, name, original)


@contextmanager
def _on_disk(argument: str, folder: Path, layout: parallel.Layout) -> Iterator[None]:
    """What is written in this block goes when it fails; a disk that is full is the user's to change.

    Raises:
        ConfigError: for an OSError.
    """
    try:
        yield
    except BaseException as error:
        if layout.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        # torch.save tells of a disk in a RuntimeError of its own
        if isinstance(error, OSError) or "PytorchStreamWriter" in str(error):
            rule = f"cannot be written ({str(error).splitlines()[0]})"
            raise ConfigError(argument, str(folder), rule, "Make room on that disk, or use another one") from error
        raise
