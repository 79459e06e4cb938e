"""Fill a stage's parameters from a Hugging Face folder or from a seed; each rank reads only its own slices."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nemo_jepo.config import ConfigError
from nemo_jepo.weights.layout import Shape, TensorSource, model_entries
from nemo_jepo.weights.parameters import named_stage_parameters

_KEY = "pretrained_checkpoint.restore_from_path"


class SafetensorsFolder:
    """Slices of the tensors in a Hugging Face folder: model.safetensors, or shards with an index."""

    def __init__(self, folder: str | Path) -> None:
        """Map every tensor name to its file.

        Raises:
            ConfigError: the folder holds no safetensors weights, or a file that cannot be read.
        """
        folder = Path(folder)
        index = folder / "model.safetensors.index.json"
        files = _files_of(index) if index.exists() else sorted(folder.glob("*.safetensors"))
        if not files:
            raise ConfigError(_KEY, str(folder), "holds no *.safetensors", "Convert the weights")
        self._handles: dict[str, Any] = {}
        for file in files:
            try:
                handle = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise _unreadable(file, error) from error
            self._handles |= dict.fromkeys(handle.keys(), handle)

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Every tensor is there with its shape, and no other (rotary buffers and a tied head's copy aside).

        Raises:
            ConfigError: names the first tensor that is missing, misshaped or unknown.
        """
        for name, shape in shapes.items():
            if name not in self._handles:
                raise ConfigError(
                    _KEY, name, "is missing from the safetensors files", "Check config.json and the folder"
                )
            found = tuple(self._handles[name].get_slice(name).get_shape())
            if found != shape:
                raise ConfigError(_KEY, name, f"has shape {found}, config.json asks for {shape}", "Check config.json")
        ignored = ("rotary_emb.inv_freq", "lm_head.weight")
        extra = [name for name in self._handles if name not in shapes and not name.endswith(ignored)]
        if extra:
            raise ConfigError(_KEY, extra[0], "is not part of this architecture", "Check config.json and the folder")

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """The whole tensor, or tensor[start:stop] along dim."""
        if dim is None:
            return self._handles[name].get_tensor(name)
        part = self._handles[name].get_slice(name)
        return part[start:stop] if dim == 0 else part[:, start:stop]


def _files_of(index: Path) -> list[Path]:
    """The shards that an index lists."""
    try:
        return [index.parent / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(index, error) from error


def _unreadable(file: Path, error: Exception) -> ConfigError:
    return ConfigError(_KEY, str(file), f"cannot be read ({error})", "Copy it again")


class SeededWeights:
    """Random initial weights, as if they lay in a folder: normal(0, initializer_range), norms 1, biases 0.

    Every tensor is drawn from a generator seeded by (seed, its name), so that any parallel layout starts from the
    same model.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], initializer_range: float, seed: int) -> None:
        self._shapes, self._range, self._seed = shapes, initializer_range, seed

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """The whole tensor, or tensor[start:stop] along dim."""
        if name.endswith("norm.weight"):
            tensor = torch.ones(self._shapes[name])
        elif name.endswith(".bias"):
            tensor = torch.zeros(self._shapes[name])
        else:
            digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            tensor = torch.randn(self._shapes[name], generator=generator) * self._range
        return tensor if dim is None else tensor.narrow(dim, start, stop - start)


def hf_shapes(hf_config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a supported Hugging Face model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for _, _, entry in model_entries(Shape.of(hf_config)):
        shapes |= entry.hf_shapes()
    return shapes


def load_stage(gpt: nn.Module, hf_config: Any, source: TensorSource, rank: int, size: int) -> None:
    """Write every parameter of this stage.

    Args:
        gpt: the stage's GPTModel, unwrapped.
        rank, size: this rank's place in the tensor-parallel group.
    """
    entries = {name: entry for name, _, entry in model_entries(Shape.of(hf_config))}
    with torch.no_grad():
        for name, parameter in named_stage_parameters(gpt):
            parameter.copy_(entries[name].read_shard(source, rank, size))


def open_source(hf_config: Any, path: str | None, seed: int) -> TensorSource:
    """The weights of a Hugging Face folder, checked against hf_config; or seeded random ones without a path."""
    shapes = hf_shapes(hf_config)
    if path is None:
        return SeededWeights(shapes, hf_config.initializer_range, seed)
    folder = SafetensorsFolder(path)
    folder.check(shapes)
    return folder
