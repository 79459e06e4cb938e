"""Hugging Face configs that the actor takes, and those that it would compute differently and therefore refuses."""

import json
from typing import Any

import pytest

from nemo_jepo.actor.model import load_hf_config, padded_vocab_size
from nemo_jepo.actor.weights.families import Shape
from nemo_jepo.config.errors import ConfigError
from tests.distributed.batch import TINY
from tests.support.hf_models import LLAMA3, SHAPES

YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
REFUSED = {
    "unknown family": ({"model_type": "gpt2"}, "model_type='gpt2'"),
    "no family": ({}, "model_type=None"),
    "yarn": ({"model_type": "qwen3", "rope_parameters": YARN}, "rope_parameters="),
    "other llama3 numbers": ({"model_type": "llama", "rope_parameters": LLAMA3 | {"low_freq_factor": 2.0}}, "rope_"),
    "llama with attention bias": ({"model_type": "llama", "attention_bias": True}, "attention_bias=True"),
    "qwen3 with attention bias": ({"model_type": "qwen3", "attention_bias": True}, "attention_bias=True"),
    "mlp bias": ({"model_type": "llama", "mlp_bias": True}, "mlp_bias=True"),
    "gelu": ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act='gelu'"),
    "sliding window": ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window=True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_actor_would_compute_differently_is_refused(case):
    changes, key = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        load_hf_config(TINY | changes)
    assert key in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_of_another_family_is_refused_too(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ConfigError, match="model_type='gpt2'"):
        load_hf_config(str(tmp_path))


@pytest.mark.parametrize("shape", SHAPES)
def test_inline_folder_and_file_give_one_config(shape, tmp_path):
    inline = load_hf_config(SHAPES[shape])
    inline.save_pretrained(tmp_path)

    def numbers(config: Any) -> dict[str, Any]:
        return {key: config.to_dict()[key] for key in [*SHAPES[shape], "rope_parameters"]}

    assert numbers(load_hf_config(str(tmp_path))) == numbers(inline)
    assert numbers(load_hf_config(str(tmp_path / "config.json"))) == numbers(inline)


def test_the_rope_keys_of_older_files_are_understood():
    """Llama 3.1's own config.json: rope_theta and rope_scaling at the top."""
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    config = load_hf_config({"model_type": "llama", "rope_theta": 3000.0, "rope_scaling": scaling} | TINY)
    assert config.rope_parameters == LLAMA3


def test_the_head_size_may_differ_from_hidden_size_over_heads():
    assert Shape.of(load_hf_config(TINY | {"model_type": "qwen3"})).head_size == 16
    assert Shape.of(load_hf_config(TINY | {"model_type": "llama", "head_dim": None})).head_size == 8


def test_a_vocabulary_is_padded_to_a_multiple_of_the_ranks():
    config = load_hf_config(TINY | {"model_type": "llama", "vocab_size": 101})
    assert [padded_vocab_size(config, ranks) for ranks in (1, 2, 4, 8)] == [101, 102, 104, 104]


def test_every_rank_holds_a_token_of_the_vocabulary():
    """9 tokens over 4 ranks: 3 + 3 + 3 + 0; over 5: 2 + 2 + 2 + 2 + 1."""
    config = load_hf_config(TINY | {"model_type": "llama", "vocab_size": 9})
    assert padded_vocab_size(config, 5) == 10
    with pytest.raises(ConfigError, match="model.tensor_model_parallel_size=4: leaves a rank without a token"):
        padded_vocab_size(config, 4)
