"""The weight stream: the whole model as (Hugging Face name, tensor), gathered one parameter at a time.

Samplers and export read the same stream. Every rank of a replica must drain it, because gathering is collective:
over the tensor-parallel group on the stage that owns a parameter, then over the pipeline group.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from nemo_jepo.weights.layout import Shape, model_entries
from nemo_jepo.weights.parameters import stage_parameters


class Groups(Protocol):
    """The process groups that the stream gathers over."""

    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup


def weight_stream(gpt: nn.Module, hf_config: Any, groups: Groups) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model under its Hugging Face name, in the model's order and dtype, on every rank.

    A tied output matrix appears once, as model.embed_tokens.weight. Holds one parameter (all its shards) at a time.
    """
    shape = Shape.of(hf_config)
    own = stage_parameters(gpt)
    layers_per_stage = shape.num_layers // groups.pipeline_group.size()
    last_stage = groups.pipeline_group.size() - 1
    for name, layer, entry in model_entries(shape):
        if layer is not None:
            stage = layer // layers_per_stage
        else:
            stage = 0 if name.startswith("embedding.") else last_stage
        if stage == groups.pipeline_group.rank():
            tensors = entry.join_shards(_gather_shards(own[name].detach(), groups.tensor_group))
        else:
            like = next(iter(own.values()))
            tensors = {
                hf_name: torch.empty(size, dtype=like.dtype, device=like.device)
                for hf_name, size in entry.hf_shapes().items()
            }
        for hf_name, tensor in tensors.items():
            tensor = tensor.contiguous()
            dist.broadcast(tensor, group=groups.pipeline_group, group_src=stage)
            yield hf_name, tensor


def stream_shapes(hf_config: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Names and full shapes of the tensors of `weight_stream`, in its order, without the tensors."""
    return [item for _, _, entry in model_entries(Shape.of(hf_config)) for item in entry.hf_shapes().items()]


def _gather_shards(shard: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    if group.size() == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return shards


def export_hf(
    stream: Iterable[tuple[str, Tensor]],
    hf_config: Any,
    folder: Path,
    shard_bytes: int = 1 << 30,
    tokenizer: Any = None,
) -> None:
    """Write a stream as a Hugging Face folder: config.json, safetensors shards, their index, and the tokeniser.

    The folder appears under its own name only when it is whole.

    Raises:
        FileExistsError: the folder exists.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; export writes new folders only")
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    for leftover in partial.iterdir():
        leftover.unlink()
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    held = 0

    def flush() -> None:
        nonlocal held
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, partial / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()
        held = 0

    for name, tensor in stream:
        shard[name] = tensor.cpu().clone()
        held += tensor.numel() * tensor.element_size()
        if held >= shard_bytes:
            flush()
    if shard:
        flush()
    hf_config.save_pretrained(partial)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    index = {"metadata": {}, "weight_map": weight_map}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    os.rename(partial, folder)
