"""The families of models that the actor trains: the one list of them, and what tells one from another. No torch here.

A new family is an entry in FAMILIES; names.py makes its parameters from that.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from nemo_jepo.config.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Experts:
    """How a family with experts names them inside a layer, and what a config of it may leave out."""

    router: str
    experts: str
    gate: str
    up: str
    down: str
    num_experts: int
    """Where a config does not say."""
    num_per_token: int
    """Likewise: experts that a token visits."""
    width: int | None = None
    """Likewise: channels of one expert (moe_intermediate_size). None: an expert is as wide as intermediate_size."""


@dataclass(frozen=True, slots=True)
class Family:
    """What tells one family's models from another's."""

    qkv_bias: bool = False
    qk_norm: bool = False
    head_size: int | None = None
    """Where a config does not say; None: hidden size over heads."""
    experts: Experts | None = None


FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True, head_size=128),
    "qwen3_moe": Family(
        qk_norm=True,
        experts=Experts("mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj", 128, 8, width=768),
    ),
    "mixtral": Family(
        experts=Experts("block_sparse_moe.gate", "block_sparse_moe.experts", "w1", "w3", "w2", 8, 2),
    ),
}
"""`model_type` of a Hugging Face config -> family."""


def family_of(model_type: object, key: str = "model_type") -> Family:
    """The family of a Hugging Face config.

    Args:
        key: of the setting that holds model_type, for the error.
    Raises:
        ConfigError: a family without an entry above.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(key, model_type, f"must be one of {', '.join(FAMILIES)}", "Use a model of these families")
    return FAMILIES[model_type]


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of a Hugging Face config that decide sizes and layouts."""

    model_type: str
    num_layers: int
    hidden_size: int
    inner_size: int
    """Channels of the gated MLP, or of one expert."""
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    tied: bool
    num_experts: int
    """Of one layer; 0 for a dense model."""
    experts_per_token: int
    """0 for a dense model."""

    @property
    def family(self) -> Family:
        """The model's entry in FAMILIES."""
        return FAMILIES[self.model_type]

    @property
    def query_width(self) -> int:
        """Channels of all query heads."""
        return self.num_heads * self.head_size

    @property
    def key_value_width(self) -> int:
        """Channels of all key heads, and of all value heads."""
        return self.num_kv_heads * self.head_size

    @classmethod
    def of(cls, config: Any) -> Self:
        """From a transformers config, or from a mapping as config.json has it, which may leave defaults out.

        Raises:
            ConfigError: an unknown family.
        """
        config = config if isinstance(config, Mapping) else config.to_dict()
        family = family_of(config["model_type"])
        experts, heads = family.experts, config["num_attention_heads"]
        inner_size, num_experts, per_token = config["intermediate_size"], 0, 0
        if experts is not None:
            if experts.width is not None:
                inner_size = config.get("moe_intermediate_size", experts.width)
            num_experts = config.get("num_local_experts") or config.get("num_experts") or experts.num_experts
            per_token = config.get("num_experts_per_tok", experts.num_per_token)
        return cls(
            model_type=config["model_type"],
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            inner_size=inner_size,
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim", family.head_size) or config["hidden_size"] // heads,
            vocab_size=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
            num_experts=num_experts,
            experts_per_token=per_token,
        )
