"""Fill a rank's parameters from a Hugging Face folder or from a seed; each rank reads only its own slices."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nemo_jepo.actor.parallel import Layout
from nemo_jepo.actor.weights.families import Shape
from nemo_jepo.actor.weights.hf_folder import SafetensorsFolder
from nemo_jepo.actor.weights.names import model_parameters
from nemo_jepo.actor.weights.parameters import named_parameters
from nemo_jepo.actor.weights.slices import TensorSource


class SeededWeights:
    """Random initial weights, as if they lay in a folder: normal(0, initializer_range), norms 1, biases 0.

    Every tensor is drawn from a generator seeded by (seed, its name), so that any parallel layout starts from the
    same model.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], initializer_range: float, seed: int) -> None:
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
    """Names and shapes of all tensors of a supported Hugging Face model, in the order of the weight stream."""
    shapes: dict[str, tuple[int, ...]] = {}
    for parameter in model_parameters(Shape.of(hf_config)):
        shapes |= parameter.entry.hf_shapes()
    return shapes


@torch.no_grad()
def load_stage(chunks: Sequence[nn.Module], hf_config: Any, source: TensorSource, layout: Layout) -> None:
    """Write every parameter of this rank.

    Args:
        chunks: this rank's GPTModels, unwrapped.
    """
    parameters = {parameter.name: parameter for parameter in model_parameters(Shape.of(hf_config))}
    own = dict(named_parameters(chunks, layout))
    for name, target in own.items():
        whole = parameters[name].expert is not None
        rank, size = (0, 1) if whole else (layout.tensor_group.rank(), layout.tensor_group.size())
        shard = parameters[name].entry.read_shard(source, rank, size)
        assert shard.shape == target.shape, f"{name}: {tuple(shard.shape)} for {tuple(target.shape)}"
        target.copy_(shard)
    places = {parameters[name].place for name in own}
    forgotten = [
        name
        for name, parameter in parameters.items()
        if parameter.place in places and parameter.expert is None and name not in own
    ]
    assert not forgotten, f"the model has no {forgotten[0]}"


def open_source(hf_config: Any, path: str | None, seed: int) -> TensorSource:
    """The weights of a Hugging Face folder, checked against hf_config; or seeded random ones without a path."""
    shapes = hf_shapes(hf_config)
    if path is None:
        return SeededWeights(shapes, hf_config.initializer_range, seed)
    folder = SafetensorsFolder(path)
    folder.check(shapes)
    return folder
