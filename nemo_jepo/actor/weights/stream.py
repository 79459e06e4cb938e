"""The weight stream: the whole model as (Hugging Face name, tensor), gathered one tensor at a time.

Samplers and export read the same stream. Every rank of the world must drain it, because gathering is collective: over
the tensor-parallel group of the stage that owns a parameter (an expert comes from its expert-parallel rank), then over
the pipeline group. Expert-parallel groups reach across data-parallel replicas.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_jepo.actor.parallel import Layout
from nemo_jepo.actor.weights.families import Shape
from nemo_jepo.actor.weights.names import ModelParameter, model_parameters, place_of
from nemo_jepo.actor.weights.parameters import named_parameters


def weight_stream(chunks: Sequence[nn.Module], hf_config: Any, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model under its Hugging Face name, in the model's order and dtype, on every rank.

    A tied output matrix appears once, as model.embed_tokens.weight. Holds one tensor at a time and, while it is joined,
    its shards; a tensor may be the model's own memory, so readers copy what they keep and write into nothing.

    Args:
        chunks: this rank's GPTModels, unwrapped.
    """
    shape = Shape.of(hf_config)
    own = {name: parameter.detach() for name, parameter in named_parameters(chunks, layout)}
    stages = _owning_stages(own, layout.pipeline_group)
    like = next(iter(own.values()))
    for parameter in model_parameters(shape):
        stage = stages[parameter.place]
        on_stage = stage == layout.pipeline_group.rank()
        if on_stage and parameter.name in own:
            tensors = _gather(own[parameter.name], parameter, layout)
        else:
            tensors = _unset(parameter, like)
        for name, tensor in tensors:
            tensor = tensor.contiguous()
            if on_stage and parameter.expert is not None:
                num_local = shape.num_experts // layout.expert_group.size()
                dist.broadcast(tensor, group=layout.expert_group, group_src=parameter.expert // num_local)
            dist.broadcast(tensor, group=layout.pipeline_group, group_src=stage)
            yield name, tensor
            del tensor  # before the next one is made


def _owning_stages(own: Iterable[str], group: dist.ProcessGroup) -> dict[str, int]:
    """The pipeline rank of every place in the model, agreed over the pipeline group; the first, where two hold one."""
    places: list[Any] = [None] * group.size()
    dist.all_gather_object(places, sorted({place_of(name) for name in own}), group=group)
    return {place: stage for stage in reversed(range(group.size())) for place in places[stage]}


def _gather(own: Tensor, parameter: ModelParameter, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """A parameter's Hugging Face tensors from its shards on the tensor-parallel ranks; an expert has one shard."""
    group = layout.tensor_group
    for number, part in enumerate(parameter.entry.parts(own)):
        if parameter.expert is not None or group.size() == 1:
            yield from parameter.entry.join(number, part[None])
            continue
        shards = part.new_empty(group.size(), *part.shape)
        dist.all_gather(list(shards), part.contiguous(), group=group)
        yield from parameter.entry.join(number, shards)
        del shards


def _unset(parameter: ModelParameter, like: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Room for tensors that come from another rank."""
    for name, size in parameter.entry.hf_shapes().items():
        yield name, torch.empty(size, dtype=like.dtype, device=like.device)
