"""What a Hugging Face config says about size: parameters, matrix products and key-value cache of one model.

    h hidden size, f width of the feed-forward layer (of one expert), q = heads * head size, k = key-value heads * head
    size, L layers, V vocabulary, E experts of which a token visits A

    attention     h (q + 2k) + q h        (qkv_bias: + q + 2k; qk_norm: + 2 head sizes)
    feed-forward  3 h f                   (experts: E 3 h f, and a router of E h)
    norms         2 h a layer, h at the end
    embedding     V h, and V h again for an output matrix that is not tied

Source: the parameter lists of transformers' LlamaForCausalLM, Qwen2..., Qwen3..., Qwen3Moe... and MixtralForCausalLM,
against which tests/unit/plan/test_shape.py counts.
"""

from collections.abc import Mapping
from typing import Any

from nemo_jepo.actor.weights.families import Shape, family_of
from nemo_jepo.config.errors import ConfigError

_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


class ModelShape(Shape):
    """What the numbers of a model come to: parameters, FLOP, bytes of cache."""

    __slots__ = ()

    @property
    def attention_matrices(self) -> int:
        """Parameters of one layer's query, key, value and output matrices."""
        return self.hidden_size * (2 * self.query_width + 2 * self.key_value_width)

    @property
    def expert_matrices(self) -> int:
        """Parameters of one expert, or of the dense feed-forward layer."""
        return 3 * self.hidden_size * self.inner_size

    @property
    def dense_matrices(self) -> int:
        """Parameters of one layer's matrices that tensor parallelism cuts."""
        return self.attention_matrices + (0 if self.num_experts else self.expert_matrices)

    @property
    def layer_vectors(self) -> int:
        """Parameters of one layer that every tensor-parallel rank holds whole (biases are counted with them)."""
        biases = self.query_width + 2 * self.key_value_width if self.family.qkv_bias else 0
        query_key_norms = 2 * self.head_size if self.family.qk_norm else 0
        return 2 * self.hidden_size + biases + query_key_norms + self.num_experts * self.hidden_size

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of the output matrix."""
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All parameters."""
        layer = self.dense_matrices + self.layer_vectors + self.num_experts * self.expert_matrices
        return self.num_layers * layer + self.hidden_size + self.embedding * (1 if self.tied else 2)

    @property
    def active_layer_matrices(self) -> int:
        """Parameters of one layer's matrices that one token is multiplied with."""
        return self.dense_matrices + self.experts_per_token * self.expert_matrices

    def forward_flops(self, context: float, scored: float = 1.0) -> float:
        """FLOP of one token's forward pass.

            2 (L active + scored V h) + L 4 q context / 2

        Two FLOP a parameter, and two products (QK^T, PV) over the tokens before it, half of `context` on average.
        Source: Kaplan et al., arXiv 2001.08361, section 2.1; Narayanan et al., arXiv 2104.04473, appendix.

        Args:
            context: tokens of the sequence that the token stands in.
            scored: share of the tokens that the output matrix sees.
        """
        matrices = self.num_layers * self.active_layer_matrices + scored * self.embedding
        return 2 * matrices + self.num_layers * self.attention_flops(context)

    def attention_flops(self, context: float) -> float:
        """FLOP of one layer's core attention for one token, causal."""
        return 2 * self.query_width * context

    def key_value_bytes(self, dtype_bytes: int = 2) -> int:
        """Bytes of key-value cache that one token takes in all layers."""
        return 2 * self.num_layers * self.key_value_width * dtype_bytes


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The shape of a Hugging Face config.

    Raises:
        ConfigError: another family, or a number is missing.
    """
    family_of(config.get("model_type"), "model.hf_config.model_type")
    missing = [name for name in _NEEDED if config.get(name) is None]
    if missing:
        raise ConfigError(f"model.hf_config.{missing[0]}", None, "the planner cannot guess it", "Add it")
    return ModelShape.of(config)
