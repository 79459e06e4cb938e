"""Query, key, value and gate, up side by side, by hand; names and shapes against transformers."""

import pytest
import torch

from nemo_jepo.actor.weights.families import Shape
from nemo_jepo.actor.weights.load import hf_shapes
from nemo_jepo.actor.weights.names import model_parameters
from nemo_jepo.actor.weights.slices import GroupedQKV, Sliced
from tests.support.hf_models import SHAPES, on_disk, random_model


@pytest.mark.parametrize("shape", SHAPES)
def test_names_and_shapes_are_those_of_transformers(shape):
    model = random_model(shape)
    assert hf_shapes(model.config) == {name: tuple(tensor.shape) for name, tensor in on_disk(model).items()}


class Named:
    """A source of given tensors."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self._tensors = tensors

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> torch.Tensor:
        tensor = self._tensors[name]
        return tensor if dim is None else tensor.narrow(dim, start, stop - start)


def test_query_key_value_lie_side_by_side_per_group():
    """4 query heads, 2 key/value heads, head size 1: group 0 is q0 q1 k0 v0, group 1 is q2 q3 k1 v1."""
    q, k, v = torch.tensor([[0.0], [1], [2], [3]]), torch.tensor([[10.0], [11]]), torch.tensor([[20.0], [21]])
    entry = GroupedQKV("", "w", num_heads=4, num_kv_heads=2, head_size=1, trailing=(1,))
    source = Named(**{"q_proj.w": q, "k_proj.w": k, "v_proj.w": v})
    assert entry.read_shard(source, 0, 1).flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    shards = [entry.read_shard(source, rank, 2) for rank in range(2)]
    assert [shard.flatten().tolist() for shard in shards] == [[0, 1, 10, 20], [2, 3, 11, 21]]
    joined = dict(entry.join(torch.stack(shards)))
    assert all(torch.equal(joined[name], source.read(name)) for name in ("q_proj.w", "k_proj.w", "v_proj.w"))


def test_gate_and_up_are_sliced_apart():
    source = Named(gate=torch.tensor([[0.0], [1], [2], [3]]), up=torch.tensor([[10.0], [11], [12], [13]]))
    entry = Sliced(("gate", "up"), (4, 1), 0)
    shards = [entry.read_shard(source, rank, 2) for rank in range(2)]
    assert [shard.flatten().tolist() for shard in shards] == [[0, 1, 10, 11], [2, 3, 12, 13]]
    joined = [(name, tensor.tolist()) for name, tensor in entry.join(torch.stack(shards))]
    assert joined == [(name, source.read(name).tolist()) for name in ("gate", "up")]


def test_a_vocabulary_is_padded_with_zeros_that_never_leave():
    source = Named(table=torch.arange(1.0, 6.0)[:, None])
    entry = Sliced(("table",), (5, 1), 0)
    shards = [entry.read_shard(source, rank, 3) for rank in range(3)]
    assert [shard.flatten().tolist() for shard in shards] == [[1, 2], [3, 4], [5, 0]]
    assert torch.equal(dict(entry.join(torch.stack(shards)))["table"], source.read("table"))


@pytest.mark.parametrize("size", [1, 2])
def test_a_shard_has_the_shape_that_others_expect_of_it(size):
    """A rank of another pipeline stage makes room for it without having seen it."""
    for shape in SHAPES:
        source, model = Named(**on_disk(random_model(shape))), random_model(shape)
        for parameter in model_parameters(Shape.of(model.config)):
            shard = parameter.entry.read_shard(source, 0, size)
            assert parameter.entry.shard_shape(size) == tuple(shard.shape), parameter.name
