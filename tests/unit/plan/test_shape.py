"""Parameter counts against transformers' own, and against what models are published with."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.tools.plan.shape import shape_of

SMALL = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES = {
    "llama": {"model_type": "llama"},
    "llama, wide heads": {"model_type": "llama", "head_dim": 16},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "qwen3, narrow heads": {"model_type": "qwen3", "head_dim": 4},
    "qwen3_moe": {"model_type": "qwen3_moe", "num_local_experts": 6, "num_experts_per_tok": 2,
                  "moe_intermediate_size": 24},
    "qwen3_moe, defaults": {"model_type": "qwen3_moe"},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4},
}  # fmt: skip
LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_as_many_as_transformers_has(family, tied):
    config = SMALL | FAMILIES[family] | {"tie_word_embeddings": tied}
    with torch.device("meta"):
        of_family = AutoConfig.for_model(**config)
        model = AutoModelForCausalLM.from_config(of_family)
    assert shape_of(config).num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape_of(of_family.to_dict()) == shape_of(config)


def test_a_llama_of_8b_has_8_03_billion_parameters():
    """The Llama 3 model card's 8.03B."""
    assert shape_of(LLAMA_8B).num_parameters == 8_030_261_248


def test_flops_of_one_layer_by_hand():
    """One layer, one head of 4, h = q = k = 4, f = 8, V = 10, at context 6, every token scored.

    Matrices: 4*(4+8) + 4*4 + 3*4*8 + 10*4 = 200 parameters, 2 FLOP each; attention: 4 * 4 * 6 / 2.
    """
    config = SMALL | {"model_type": "llama", "hidden_size": 4, "num_attention_heads": 1, "num_key_value_heads": 1}
    shape = shape_of(config | {"intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 10})
    assert shape.forward_flops(context=6) == 2 * 200 + 48
    assert shape.forward_flops(context=6, scored=0.5) == 2 * 180 + 48


def test_key_value_cache_of_a_token():
    """Llama 8B: 2 * 32 layers * 8 heads * 128 * 2 bytes = 128 KiB."""
    assert shape_of(LLAMA_8B).key_value_bytes() == 131072


@pytest.mark.parametrize(
    ("change", "beginning"),
    [
        ({"model_type": "gpt2"}, "model.hf_config.model_type='gpt2': must be one of llama"),
        ({"hidden_size": None}, "model.hf_config.hidden_size=None"),
    ],
)
def test_a_shape_that_cannot_be_planned_is_named(change, beginning):
    with pytest.raises(ConfigError, match=f"^{beginning}"):
        shape_of(LLAMA_8B | change)
