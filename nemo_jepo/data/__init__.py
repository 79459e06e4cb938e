"""Dataset rows -> Prompt, and the order in which a run reads them."""

from nemo_jepo.config.errors import DataError
from nemo_jepo.data.dataset import Dataset, load_prompts, training_texts
from nemo_jepo.data.files import BadRow
from nemo_jepo.data.stream import PromptStream
from nemo_jepo.data.tokenizer import load_tokenizer, train_tokenizer

__all__ = [
    "BadRow",
    "DataError",
    "Dataset",
    "PromptStream",
    "load_prompts",
    "load_tokenizer",
    "train_tokenizer",
    "training_texts",
]
