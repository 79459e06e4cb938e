"""What a Hugging Face config says of a model's shape, and whether a model can have it. No torch here."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_jepo.config.errors import ConfigError, shown
from nemo_jepo.config.model import ModelConfig
from nemo_jepo.config.reading import read_json, require_inside

COUNTS = {
    "vocab_size": 2**31,
    "hidden_size": 2**24,
    "intermediate_size": 2**24,
    "moe_intermediate_size": 2**24,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 2**20,
    "num_key_value_heads": 2**20,
    "head_dim": 2**20,
    "num_local_experts": 10_000,
    "num_experts": 10_000,
    "num_experts_per_tok": 10_000,
    "max_position_embeddings": 2**40,
}
"""Whole numbers, each with the most that is believed: beyond every model, and small enough to count with."""
MAY_BE_ZERO = ("num_local_experts", "num_experts")
POSITIVE = ("rms_norm_eps", "initializer_range", "rope_theta")
"""The other numbers that the actor reads."""
FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "norm_topk_prob")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
MOST_EXPERTS = 1_000_000
"""Of all layers together: their tensors are listed one by one."""


def model_shape(model: ModelConfig, restore_from_path: str | None) -> dict[str, Any] | None:
    """The Hugging Face config of the model as a dict; None for a checkpoint that keeps its own elsewhere.

    Raises:
        ConfigError: a file that is no config.json, or numbers that no model has.
    """
    if model.hf_config:
        check_shape("model.hf_config", model.hf_config)
        return model.hf_config
    key = "model.hf_config_path" if model.hf_config_path else "pretrained_checkpoint.restore_from_path"
    path = Path(model.hf_config_path or str(restore_from_path))
    file = path / "config.json" if path.is_dir() else path
    return read_hf_config(key, file) if os.path.lexists(file) else None


def read_hf_config(key: str, file: Path) -> dict[str, Any]:
    """What a config.json says.

    Args:
        key: of the setting that names it, for the error.
    Raises:
        ConfigError: the file cannot be read, lies outside of its folder, or holds numbers that no model has.
    """
    require_inside(key, file.parent, file)
    shape = read_json(key, file)
    check_shape(key, shape, file)
    return shape


def check_shape(key: str, shape: Mapping[str, Any], file: Path | None = None) -> None:
    """The numbers of a config, which may leave some out, are such that a model can have them.

    Args:
        key: of the setting that holds the config, or that names its file.
    Raises:
        ConfigError: the first impossible one.
    """
    fault = next(_impossible(shape), None)
    if fault is None:
        return
    name, rule = fault
    if file is None:
        raise ConfigError(f"{key}.{name}", shape[name], rule, "Correct it")
    raise ConfigError(key, str(file), f"{name}={shown(shape[name])}: {rule}", "Correct it, or copy the file again")


def _impossible(shape: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, rule) of every number that no model has. Relations come last: their numbers are numbers by then."""
    for name, most in COUNTS.items():
        least = 0 if name in MAY_BE_ZERO else 1
        if shape.get(name) is not None and not _is_count(shape[name], least, most):
            yield name, f"must be a whole number from {least} to {most:,}"
    for name in POSITIVE:
        if shape.get(name) is not None and not is_positive(shape[name]):
            yield name, "must be a positive number"
    for name in FLAGS:
        if not isinstance(shape.get(name), (bool, type(None))):
            yield name, "must be true or false"
    for name in TOKENS:
        ids = shape.get(name)
        if ids is not None and not all(_is_count(it, -1, 2**31) for it in (ids if isinstance(ids, list) else [ids])):
            yield name, "must be a token's number, or a list of them"
    hidden, heads, layers = (shape.get(name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    if heads and (groups := shape.get("num_key_value_heads")) and heads % groups:
        yield "num_key_value_heads", f"must divide num_attention_heads={heads}"
    if heads and hidden and not shape.get("head_dim") and hidden < heads:
        yield "num_attention_heads", f"leaves no channel of hidden_size={hidden} for each"
    for name in MAY_BE_ZERO:
        experts, chosen = shape.get(name) or 0, shape.get("num_experts_per_tok")
        if layers and layers * experts > MOST_EXPERTS:
            yield name, f"with num_hidden_layers={layers} they are more than {MOST_EXPERTS:,} experts"
        if experts and chosen and chosen > experts:
            yield "num_experts_per_tok", f"must be at most {name}={experts}"


def _is_count(number: object, least: int, most: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and least <= number <= most


def is_positive(number: object) -> bool:
    """Whether something is a number above 0 that a float holds."""
    return isinstance(number, (int, float)) and not isinstance(number, bool) and 0 < number < 1e300
