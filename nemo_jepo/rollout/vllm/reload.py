"""A model inside vLLM takes new weights in checkpoint format: all of them, or it is an error.

    begin_reload --model.load_weights, any number of times--> end_reload

vLLM 0.32 only logs a layer that got no weights, which then keeps its old ones, and fills up one that got half of them
with whatever is in memory.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import safe_open
from torch import nn

_PARAMETERS: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()
"""Names of a model's parameters, as they are before its first reload: one that two layers share is there once."""


def begin_reload(model: nn.Module) -> None:
    """Prepare a model for weights; what is left of an update that broke off is forgotten.

    vLLM 0.32 would count it among the new tensors, and take a layer for whole that is not.
    """
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    _PARAMETERS.setdefault(model, frozenset(name for name, _ in model.named_parameters()))
    initialize_layerwise_reload(model)
    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.can_load():
            info.loaded_weights.clear()
            info.load_numel = 0


def end_reload(model: nn.Module, model_config: Any) -> None:
    """Process what was loaded, then what vLLM 0.32's CPU build forgets.

    It keeps a packed copy of an output head that is the embedding as well, and a reload does not renew it: the head
    would stay old.

    Raises:
        ValueError: a layer got no weights, or a part of them. The model is not to be used before another reload.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    if incomplete := layers_not_loaded(model):
        more = f" and {len(incomplete) - 3} more" if len(incomplete) > 3 else ""
        raise ValueError(f"not all weights of {', '.join(incomplete[:3])}{more} came: they are of another model")
    finalize_layerwise_reload(model, model_config)
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


def layers_not_loaded(model: nn.Module) -> list[str]:
    """Layers with parameters of which nothing has come; plain linear ones also where a part has.

    Of others a part may be all there is: a vocabulary is padded, and attention has scales that few folders hold.
    """
    from vllm.model_executor.layers.attention import is_deferred_attention_layer
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    owners = {name.rpartition(".")[0] for name in _PARAMETERS[model]}
    found = []
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        if name not in owners or not info.can_load() or is_deferred_attention_layer(layer):
            continue
        plain = isinstance(layer, LinearBase) and type(layer.quant_method) is UnquantizedLinearMethod
        if info.load_numel == 0 or (plain and info.load_numel < info.load_numel_total):
            found.append(name)
    return found


def check_description(names: Sequence[str], shapes: Sequence[Sequence[int]], dtype_name: str) -> torch.dtype:
    """The dtype of what a trainer says it will send; ValueError unless it is tensors with names of their own."""
    dtype = getattr(torch, dtype_name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{dtype_name!r} is no dtype")
    if len(set(names)) != len(names) or len(names) != len(shapes) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{len(names)} names, {len(set(names))} of them different, for {len(shapes)} tensors")
    if not all(type(size) is int and size > 0 for shape in shapes for size in shape):
        raise ValueError("a size is no positive number")
    return dtype


def tensors_in(folder: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a folder's safetensors; nothing else in it is read.

    Raises:
        ValueError: it is not the absolute path of a folder that has some.
    """
    files = sorted(Path(folder).glob("*.safetensors")) if Path(folder).is_absolute() else []
    if not files:
        raise ValueError(f"{folder!r} is not the absolute path of a folder with safetensors")
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                yield name, tensors.get_tensor(name)
