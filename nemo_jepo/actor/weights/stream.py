"""The weight stream: the whole model as (Hugging Face name, tensor), gathered one layer at a time for its one reader.

Samplers and export read the same stream, on a replica's first rank. Every rank of the world must drain it all the same,
because gathering is collective:

    shards of a layer -> all-gather over the tensor-parallel group; experts: over the expert-parallel group
                      -> a later pipeline stage sends the layer to the first one
                      -> the replica's first rank joins shards into Hugging Face tensors

Expert-parallel groups reach across data-parallel replicas, so that all of them gather at the same time.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_jepo.actor.parallel import Layout
from nemo_jepo.actor.weights.families import Shape
from nemo_jepo.actor.weights.names import ModelParameter, model_parameters, place_of
from nemo_jepo.actor.weights.parameters import named_parameters


def weight_stream(chunks: Sequence[nn.Module], hf_config: Any, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model under its Hugging Face name, in the model's order and dtype, on a replica's first rank.

    Other ranks take part and are given nothing. A tied output matrix appears once, as model.embed_tokens.weight. Holds
    the shards of one layer (of its experts, apart), or of one large table; a tensor may be the model's own memory, so
    readers copy what they keep and write into nothing.

    Args:
        chunks: this rank's GPTModels, unwrapped.
    """
    own = {name: parameter.detach() for name, parameter in named_parameters(chunks, layout)}
    stages = _owning_stages(own, layout.pipeline_group)
    parameters = model_parameters(Shape.of(hf_config))
    for (place, _), part in itertools.groupby(parameters, lambda parameter: (parameter.place, parameter.is_expert)):
        together = list(part)
        shards = _gather(together, own, stages[place], layout)
        for parameter in together if layout.is_replica_head else ():
            for name, tensor in parameter.entry.join(shards.pop(parameter.name)):
                yield name, tensor.contiguous()
                del tensor  # which may be a view of the whole layer's shards


def _owning_stages(own: Iterable[str], group: dist.ProcessGroup) -> dict[str, int]:
    """The pipeline rank of every place in the model, agreed over the pipeline group; the first, where two hold one."""
    places: list[Any] = [None] * group.size()
    dist.all_gather_object(places, sorted({place_of(name) for name in own}), group=group)
    return {place: stage for stage in reversed(range(group.size())) for place in places[stage]}


def _gather(
    parameters: Sequence[ModelParameter], own: Mapping[str, Tensor], stage: int, layout: Layout
) -> dict[str, Tensor]:
    """Each parameter's shards, [n, ...], on the replica's first rank; parameters of one place, experts or none of them.

    Args:
        own: this rank's shards by name.
        stage: the pipeline rank that holds the place.
    """
    is_expert, pipeline = parameters[0].is_expert, layout.pipeline_group
    group = layout.expert_group if is_expert else layout.tensor_group
    if group.size() == 1 and stage == 0:
        return {name: own[name][None] for name in (p.name for p in parameters) if name in own}

    if stage != pipeline.rank() and not layout.is_replica_head:
        return {}

    # One tensor of each rank: its shards, or all of its experts
    shapes = {p.name: p.entry.shard_shape(1 if is_expert else group.size()) for p in parameters}
    sizes = [math.prod(shape) for shape in shapes.values()]
    like = next(iter(own.values()))
    gathered = like.new_empty(group.size(), sum(sizes) // group.size() if is_expert else sum(sizes))
    if stage == pipeline.rank():
        held = torch.cat([own[name].flatten() for name in shapes if name in own])[None]
        dist.all_gather_into_tensor(gathered, held, group=group)

    # To the replica's first rank
    if stage != 0 and layout.is_replica_head:
        dist.recv(gathered, group=pipeline, group_src=stage)
    elif stage != 0 and layout.in_heads_pipeline:
        dist.send(gathered, group=pipeline, group_dst=0)
    if not layout.is_replica_head:
        return {}
    rows = gathered.view(1, -1) if is_expert else gathered  # an expert has one shard, and ranks hold them in order
    pieces = zip(shapes.items(), rows.split(sizes, dim=1), strict=True)
    return {name: piece.view(len(rows), *shape) for (name, shape), piece in pieces}
