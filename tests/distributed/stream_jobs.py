"""What the weight stream gives in a layout, and what ranks send each other for it."""

from collections import Counter
from collections.abc import Iterable
from typing import Any
from unittest import mock

import torch

from nemo_jepo.actor import parallel
from nemo_jepo.actor.actor import MegatronJEPOActor
from nemo_jepo.actor.model import load_hf_config
from nemo_jepo.actor.weights.load import load_stage, open_source
from nemo_jepo.actor.weights.stream import weight_stream
from nemo_jepo.config.schema import ModelConfig
from nemo_jepo.rollout.queue import RolloutQueue


def build(job: dict[str, Any]) -> MegatronJEPOActor:
    """An actor of the job's shape in its layout."""
    model = ModelConfig(**job["model"])
    parallel.init_model_parallel(model)
    return MegatronJEPOActor(load_hf_config(job["shape"]), model, "fp32", parallel.Layout())


def stream(job: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The stream in order, the same on every replica's first rank and empty on the others.

    Args:
        job: shape, folder or None, seed, model.
    """
    actor = build(job)
    layout, hf_config = actor.layout, actor.hf_config
    for parameter in (p for chunk in actor.chunks for p in chunk.parameters()):
        torch.nn.init.constant_(parameter, torch.nan)  # a parameter that is not loaded shows
    source = open_source(hf_config, job["folder"], job["seed"])
    load_stage(actor.chunks, hf_config, source, layout)
    tensors = {name: tensor.clone() for name, tensor in weight_stream(actor.chunks, hf_config, layout)}
    everywhere: list[Any] = [None] * layout.world_size
    torch.distributed.all_gather_object(everywhere, tensors)
    for name in tensors:
        assert torch.equal(tensors[name], everywhere[0][name]), name
    assert bool(tensors) == layout.is_replica_head
    return tensors


def traffic(job: dict[str, Any]) -> dict[str, int]:
    """Bytes that this rank gives to others while the stream is read, by collective; its own shards' bytes as "own"."""
    actor = build(job)
    layout, hf_config = actor.layout, actor.hf_config
    counts: Counter[str] = Counter()

    def counting(name: str, position: int) -> Any:
        call = getattr(torch.distributed, name)

        def count(*tensors: torch.Tensor, group: torch.distributed.ProcessGroup, **others: Any) -> Any:
            if group.size() > 1:
                counts[name] += tensors[position].nbytes
            return call(*tensors, group=group, **others)

        return mock.patch.object(torch.distributed, name, count)

    with counting("all_gather_into_tensor", 1), counting("send", 0), counting("recv", 0), counting("broadcast", 0):
        read = sum(tensor.nbytes for _, tensor in weight_stream(actor.chunks, hf_config, layout))
    own = sum(parameter.nbytes for chunk in actor.chunks for parameter in chunk.parameters())
    return dict(counts) | {"read": read, "own": own}


class Wanting:
    """A sampler that wants the weights so often, because so many servers were lost while they came."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.taken: list[dict[str, torch.Tensor]] = []

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], policy_version: int) -> bool:
        self.taken.append({name: tensor.clone() for name, tensor in named_tensors})
        return len(self.taken) < self.times


def repeated(job: dict[str, Any]) -> tuple[int, int]:
    """How often this rank made the stream, and how often its sampler took it, each time the same."""
    actor = build(job)
    layout, hf_config = actor.layout, actor.hf_config
    load_stage(actor.chunks, hf_config, open_source(hf_config, None, 7), layout)
    made: list[None] = []

    def weights() -> Iterable[tuple[str, torch.Tensor]]:
        made.append(None)
        return weight_stream(actor.chunks, hf_config, layout)

    sampler = Wanting(job["times"][layout.data_parallel_rank]) if layout.is_replica_head else None
    queue = RolloutQueue(sampler, layout, lambda number: None, lambda ahead: (), 0, None)  # type: ignore[arg-type, return-value]
    queue.load_weights(weights, 4)
    assert queue.version == 4
    taken = sampler.taken if sampler is not None else []
    for again in taken[1:]:
        assert all(torch.equal(again[name], tensor) for name, tensor in taken[0].items())
    return len(made), len(taken)
