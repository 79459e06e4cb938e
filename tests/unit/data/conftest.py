"""A small byte-level tokenizer for the data tests, made by the program's own `train_tokenizer`."""

import pytest
from transformers import PreTrainedTokenizerBase

from nemo_jepo.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> PreTrainedTokenizerBase:
    texts = ["What is 6 * 7? It is 42.", "Natalia sold clips to 48 of her friends."] * 4
    return train_tokenizer(texts, vocab_size=300, folder=tmp_path_factory.mktemp("tokenizer") / "small")
