"""What a run makes of a model's own settings."""

import pytest

from nemo_jepo.config.schema import ModelConfig
from nemo_jepo.setup import find_hf_config
from tests.support.hf_models import random_model
from tests.support.small_tokenizers import small_tokenizer

END = small_tokenizer("byte_level").eos_token_id


@pytest.mark.parametrize(
    ("own", "expected"), [(None, [END]), (7, [END, 7]), ([7, 8], [END, 7, 8]), (END, END), ([7, END], [7, END])]
)
def test_servers_stop_where_answers_end(own, expected, tmp_path):
    """The end of a chat's turn may be another token than config.json names."""
    tokenizer, config = small_tokenizer("byte_level"), random_model("llama tied").config
    config.vocab_size, config.eos_token_id = len(tokenizer), own
    config.save_pretrained(tmp_path)
    assert find_hf_config(ModelConfig(), str(tmp_path), "fp32", tokenizer).eos_token_id == expected
