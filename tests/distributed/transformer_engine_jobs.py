"""The actor with Transformer Engine's layers, in a process where `te_stub` is installed; nothing is computed."""

import importlib.metadata
import json
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core.fp8_utils import get_fp8_context
from omegaconf import OmegaConf
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from nemo_jepo.actor import parallel
from nemo_jepo.actor.actor import MegatronJEPOActor
from nemo_jepo.actor.model import HiddenStateGPTModel, load_hf_config, transformer_config
from nemo_jepo.actor.precision import assert_fp8_is_used, without_fp8
from nemo_jepo.actor.weights.load import load_stage, open_source
from nemo_jepo.actor.weights.parameters import named_parameters
from nemo_jepo.config.compose import compose
from nemo_jepo.config.schema import ModelConfig
from tests.distributed.layer_kind_jobs import carry, weights
from tests.support import te_kernels, te_stub
from tests.support.hf_models import SHAPES, on_disk, random_model, save
from tests.support.layer_kinds import ATTENTION_VARIABLES, attention_chosen_anew, local_layers

ENGINE, LOCAL = "Transformer Engine", "local"
FAMILIES = ("llama untied", "llama tied", "qwen2 untied", "qwen3 untied", "qwen3_moe untied", "mixtral untied")
FP8: dict[str, dict[str, Any]] = {
    "tensorwise": {"fp8_recipe": "tensorwise", "fp8": "e4m3"},
    "blockwise": {"fp8_recipe": "blockwise"},
    "tensorwise, the first and the last in bf16": {"fp8_recipe": "tensorwise", "first_last_layers_bf16": True},
    "blockwise, the last two in bf16": {
        "fp8_recipe": "blockwise",
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": 0,
        "num_layers_at_end_in_bf16": 2,
    },
}
RECIPES = ("jepo_8b", "jepo_8b_fp8", "jepo_70b", "jepo_70b_fp8")
ROWS: dict[str, dict[str, Any]] = {
    "packed": {"attn_mask_type": "padding_causal"},
    "shared prompts": {"attn_mask_type": "padding_causal_bottom_right", "max_seqlen_kv": 256},
    "context parallelism": {"attn_mask_type": "padding_causal", "context_parallel": True},
}
"""How `nemo_jepo.actor.te_attention` calls Transformer Engine."""


def main(file: str) -> None:
    """Write what the tests read, as JSON: by name what a part found, or the traceback with which it ended."""
    parallel.init_distributed()
    parallel.init_model_parallel(ModelConfig())
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        parts: dict[str, Callable[[], Any]] = {
            "version": partial(importlib.metadata.version, "transformer_engine"),
            "tokens of FP8 gathers": tokens_of_fp8_gathers,
            "state of delayed scaling": of_delayed_state,
            "fp8 of experts": partial(of_fp8, "qwen3_moe untied", FP8["blockwise"]),
        }
        parts |= {f"fp8, {name}": partial(of_fp8, "llama untied", settings) for name, settings in FP8.items()}
        parts |= {f"recipe {name}": partial(of_recipe, name) for name in RECIPES}
        for kind, other in ((ENGINE, LOCAL), (LOCAL, ENGINE)):
            parts |= {f"{p} attention, {kind}": partial(of_attention, kind, p) for p in ("bf16", "fp32")}
            parts |= {f"{name} from {kind}": partial(of_checkpoint, name, kind, other, folder) for name in FAMILIES}
        parts |= {f"layers of {name}": partial(of_layers, name, folder) for name in FAMILIES}
        parts |= {f"fp32 layers of {name}": partial(of_fp32, name) for name in FAMILIES}
        parts |= {f"weights of {name}": partial(of_weights, name, folder) for name in FAMILIES}
        found = {name: outcome(part) for name, part in parts.items()}
    Path(file).write_text(json.dumps(found, default=str))


def outcome(part: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"found": part()}
    except (Exception, CheckpointException):  # the latter is none of the former
        return {"raised": traceback.format_exc()}


@contextmanager
def layers(kind: str) -> Iterator[None]:
    """Inside the block models get these layers."""
    with attention_chosen_anew(), te_stub.hopper() if kind == ENGINE else local_layers():
        yield


def build(kind: str, shape: str, precision: str = "bf16", **settings: Any) -> MegatronJEPOActor:
    """An actor whose weights are all NaN until they are loaded."""
    layout, model = parallel.Layout(), ModelConfig(tokens_per_micro_batch=256, **settings)
    with layers(kind):
        actor = MegatronJEPOActor(load_hf_config(SHAPES[shape]), model, precision, layout)
    for parameter in actor.chunks[0].parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    return actor


@cache
def tensors_on_disk(name: str, folder: Path) -> tuple[str, dict[str, Tensor]]:
    """A bf16 model of transformers: its folder and what is in it."""
    model = random_model(name).bfloat16()
    return save(model, folder / name), on_disk(model)


@cache
def loaded(kind: str, name: str, folder: Path) -> MegatronJEPOActor:
    """That model in the actor."""
    actor, (path, _) = build(kind, name), tensors_on_disk(name, folder)
    load_stage(actor.chunks, actor.hf_config, open_source(actor.hf_config, path, 0), actor.layout)
    return actor


def of_layers(name: str, folder: Path) -> dict[str, Any]:
    """Shapes of parameters, and (class, whether it is Transformer Engine's) of what has weights or attends."""
    actor = loaded(ENGINE, name, folder)
    classes = {}
    for path, module in actor.chunks[0].decoder.named_modules():
        if any(True for _ in module.parameters(recurse=False)) or path.endswith("core_attention"):
            classes[path] = (type(module).__name__, is_transformer_engines(module))
    shapes = {path: parameter.shape for path, parameter in named_parameters(actor.chunks, actor.layout)}
    return {"parameters": shapes, "classes": classes}


def of_fp32(name: str) -> list[str]:
    """Modules of an fp32 model that are Transformer Engine's, where it is there."""
    modules = build(ENGINE, name, precision="fp32").chunks[0].named_modules()
    return [path for path, module in modules if is_transformer_engines(module)]


def is_transformer_engines(module: torch.nn.Module) -> bool:
    """Whether a class of the module is from its package."""
    return "transformer_engine" in {kind.__module__.partition(".")[0] for kind in type(module).__mro__}


def of_weights(name: str, folder: Path) -> dict[str, Any]:
    """The weight stream's names, and those of tensors that are not the folder's bit for bit."""
    stream = weights(loaded(ENGINE, name, folder))
    return {"names": list(stream), "lost": different(tensors_on_disk(name, folder)[1], stream)}


def of_checkpoint(name: str, kind: str, other: str, folder: Path) -> list[str]:
    """Tensors that one kind of layers writes and the other does not read bit for bit."""
    reader = build(other, name)
    carry(loaded(kind, name, folder), reader, folder / f"{name} from {kind}")
    return different(tensors_on_disk(name, folder)[1], weights(reader))


def different(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Names that only one of them has, or whose tensors differ in a bit."""
    equal = {n for n in expected.keys() & found.keys() if torch.equal(expected[n], found[n])}
    return sorted((expected.keys() | found.keys()) - equal)


def of_fp8(shape: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What each layer computes in, and what the configs of all modules say: as set, without FP8, and afterwards."""
    actor = build(ENGINE, shape, **{"fp8": "hybrid"} | settings)
    (gpt,) = actor.chunks
    assert_fp8_is_used(gpt)
    found = {"set": fp8_by_layer(gpt)}
    with without_fp8(actor.chunks):
        found["without"] = fp8_by_layer(gpt)
    found["afterwards"] = fp8_by_layer(gpt)
    return found


def fp8_by_layer(gpt: HiddenStateGPTModel) -> dict[str, Any]:
    """Transformer Engine's recipe inside Megatron's context of each layer, and `fp8` of every module's config."""
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    recipes = []
    for layer in gpt.decoder.layers:
        with te_stub.hopper(), get_fp8_context(layer.config, layer.layer_number - 1):
            enabled = FP8GlobalStateManager.is_fp8_enabled()
            recipes.append(described(FP8GlobalStateManager.get_fp8_recipe()) if enabled else "bf16")
    formats = {str(module.config.fp8) for module in gpt.modules() if hasattr(module, "config")}
    return {"layers": recipes, "configs": sorted(formats)}


def described(recipe: Any) -> str:
    """Class and format of a recipe of Transformer Engine."""
    name = next(kind.__name__ for kind in type(recipe).__mro__ if kind.__module__ == "transformer_engine.common.recipe")
    return f"{name} {recipe.fp8_format.name}"


def of_delayed_state() -> dict[str, list[str]]:
    """What a layer rounds with once it has read an older version's state of delayed scaling, and in the next pass."""
    from transformer_engine.common.recipe import DelayedScaling, Float8CurrentScaling
    from transformer_engine.pytorch import fp8_autocast

    old, layer = (build(ENGINE, "llama untied", fp8="hybrid").chunks[0].decoder.layers[0].mlp.linear_fc2 for _ in "12")
    with te_stub.hopper():
        with fp8_autocast(enabled=True, fp8_recipe=DelayedScaling()):
            old.init_fp8_metadata()
            layer.set_extra_state(old.get_extra_state())
        found = {"read": quantizers(layer)}
        with fp8_autocast(enabled=True, fp8_recipe=Float8CurrentScaling()):
            layer.init_fp8_metadata()
    return found | {"next pass": quantizers(layer)}


def quantizers(layer: Any) -> list[str]:
    """Classes of what rounds a layer's inputs, weight and gradients."""
    return sorted({type(one).__name__ for several in layer.quantizers.values() for one in several})


def of_recipe(name: str) -> dict[str, Any]:
    """Megatron's config of a recipe of conf/."""
    model = OmegaConf.to_object(compose(name).model)
    assert isinstance(model, ModelConfig) and model.hf_config is not None
    with layers(ENGINE):
        config = transformer_config(load_hf_config(model.hf_config), model, torch.bfloat16)
    return {name: getattr(value, "name", value) for name, value in vars(config).items()}


def of_attention(kind: str, precision: str) -> dict[str, Any]:
    """The actor's choice; and what Transformer Engine would take where cuDNN has kernels, and where it has none."""
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    backends = te_kernels.NVTE_Fused_Attn_Backend
    answers = {"cuDNN": backends.NVTE_F16_arbitrary_seqlen, "no cuDNN": backends.NVTE_No_Backend}
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    layout, model = parallel.Layout(), ModelConfig(tokens_per_micro_batch=256)
    with layers(kind):
        (gpt,) = MegatronJEPOActor(load_hf_config(SHAPES["llama untied"]), model, precision, layout).chunks
        found: dict[str, Any] = {
            "layers": sorted({type(layer.self_attention.core_attention).__name__ for layer in gpt.decoder.layers}),
            "backend": gpt.config.attention_backend.name,
            "variables": [os.environ[name] for name in ATTENTION_VARIABLES],
        }
        for name, answer in answers.items():
            cudnn = mock.patch.object(te_kernels, "get_fused_attn_backend", lambda *_, a=answer: a, create=True)
            for row, asked in ROWS.items():
                params = utils.AttentionParams(qkv_dtype=dtype, qkv_layout="thd_thd_thd", **asked)
                with cudnn, te_stub.hopper():
                    _, _, fused, _, unfused, _ = utils.get_attention_backend(params)
                found[f"{row}, {name}"] = "fused" if fused else "unfused" if unfused else "none"
    return found


def tokens_of_fp8_gathers() -> list[int]:
    """Tokens of a shard that blockwise scaling can gather in FP8, up to 512."""
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    quantizer = Float8BlockQuantizer(te_kernels.DType.kFloat8E4M3, rowwise=True, columnwise=True)
    return [tokens for tokens in range(1, 513) if quantizer.is_quantizable(torch.empty(tokens, 1, 256))]
