"""FP8 through Transformer Engine: Megatron's settings, what they need, and proof that FP8 layers really serve.

Every recipe takes its scales from the numbers that it rounds. Megatron's delayed scaling, which takes them from earlier
passes with gradients, is left out: a run's first scores would have scale 1, and any score would depend on those passes.
Megatron-core takes `fp8` with its local layers as well, and then trains in bf16 without a word (megatron-core 0.16.1,
fp8_utils.get_fp8_context). So every rule is checked before a model is built, and `assert_fp8_is_used` after it.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.utils import get_te_version
from torch import nn

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.layouts import check_fp8_settings
from nemo_jepo.config.schema import ModelConfig

OLDEST_TRANSFORMER_ENGINE = {"tensorwise": (2, 2), "blockwise": (2, 3)}
"""Major and minor version that each recipe needs (fp8_utils.get_fp8_recipe)."""
LOWEST_CAPABILITY = {"tensorwise": (8, 9), "blockwise": (9, 0)}
"""Compute capability of the GPU: Ada has FP8 matrix products, Hopper the block-scaled ones."""


def fp8_options(model: ModelConfig) -> dict[str, Any]:
    """TransformerConfig's keyword arguments for the FP8 settings; none of them without model.fp8.

    The first and the last layers are named by their global number, so pipeline stages need no settings of their own.
    """
    if model.fp8 is None:
        return {}
    options: dict[str, Any] = {"fp8": model.fp8, "fp8_recipe": model.fp8_recipe}
    if model.first_last_layers_bf16:
        options |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": model.num_layers_at_start_in_bf16,
            "num_layers_at_end_in_bf16": model.num_layers_at_end_in_bf16,
        }
    return options


def check_fp8(model: ModelConfig, precision: str) -> None:
    """Whether FP8 can run as it is set. Call it before a model is built.

    Args:
        precision: trainer.precision.
    Raises:
        ConfigError: the first broken rule.
    """
    check_fp8_settings(model, precision)
    if model.fp8 is not None:
        _check_transformer_engine(model)


def _check_transformer_engine(model: ModelConfig) -> None:
    installed = transformer_engine_version()
    if installed is None:
        rule = "FP8 needs Transformer Engine, which is not installed"
        raise ConfigError("model.fp8", model.fp8, rule, "Use the image of containers/Dockerfile, or model.fp8=null")
    oldest = OLDEST_TRANSFORMER_ENGINE[model.fp8_recipe]
    if installed < oldest:
        rule = f"needs Transformer Engine {_dotted(oldest)} or newer, and this is {_dotted(installed)}"
        raise ConfigError("model.fp8_recipe", model.fp8_recipe, rule, "Upgrade it, or use another recipe")
    capability, lowest = gpu_capability(), LOWEST_CAPABILITY[model.fp8_recipe]
    if capability is None or capability < lowest:
        this = "there is no GPU" if capability is None else f"this GPU has {_dotted(capability)}"
        rule = f"model.fp8_recipe={model.fp8_recipe} needs compute capability {_dotted(lowest)}, and {this}"
        raise ConfigError("model.fp8", model.fp8, rule, "Use other GPUs, or model.fp8=null")


@contextmanager
def without_fp8(chunks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block these model chunks compute in BF16, afterwards as they were set, also after an exception.

    Megatron asks config.fp8 in every forward pass whether to enter Transformer Engine's FP8 context. Outside of that
    context a layer multiplies in BF16 and touches neither its scales nor its history of largest values.
    """
    # Some layers hold a copy of the config (a mixture's experts), so every module is asked for its own.
    owners: list[Any] = [module for chunk in chunks for module in chunk.modules() if hasattr(module, "config")]
    configs = {id(module.config): module.config for module in owners}
    kept = [(config, config.fp8) for config in configs.values()]
    try:
        for config, _ in kept:
            config.fp8 = None
        yield
    finally:
        for config, fp8 in kept:
            config.fp8 = fp8


def transformer_engine_version() -> tuple[int, ...] | None:
    """Major and minor version of the Transformer Engine that Megatron would use; None without one."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return None
    return get_te_version().release[:2]


def gpu_capability() -> tuple[int, int] | None:
    """Compute capability of this rank's GPU; None without one."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def assert_fp8_is_used(model: nn.Module) -> None:
    """Proof that every linear layer inside the transformer layers is Transformer Engine's.

    The embedding, the norms, a mixture's router and the output head stay in bf16 or fp32 by design.

    Raises:
        ConfigError: names the first layer that would compute without FP8.
    """
    linear = {name: module for name, module in model.named_modules() if _is_linear(name, module)}
    for name, module in linear.items():
        if not _is_transformer_engine(module):
            rule = f"is {type(module).__name__}, not Transformer Engine's: model.fp8 would have no effect on it"
            raise ConfigError("layer", name, rule, "Install Transformer Engine, or use model.fp8=null")
    assert linear, "not a model with transformer layers"


def _is_linear(name: str, module: nn.Module) -> bool:
    """A module of a transformer layer that itself holds a weight matrix, the router's apart."""
    if ".layers." not in f".{name}." or name.endswith(".router"):
        return False
    return any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))


def _is_transformer_engine(module: nn.Module) -> bool:
    return any(kind.__module__.split(".")[0] == "transformer_engine" for kind in type(module).__mro__)
