"""Questions as vectors of a local Hugging Face model, for `--cluster --embed FOLDER`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
from tqdm import tqdm

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.reading import held_stderr, library, require_model_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KEY = "--embed"
LONGEST = 512
"""Tokens of a question that are read, its first."""
BATCH = 64
"""Questions of one forward pass, of like length."""


def embeddings(questions: Sequence[str], folder: Path) -> numpy.ndarray:
    """The mean of a model's last hidden states over each question's tokens, of length 1.

        v = m / |m|,   m = 1/T sum_t h_t

    It computes in fp32, on a GPU where there is one. The same machine and versions give the same.

    Args:
        folder: of a model that `transformers.AutoModel` knows, with its tokenizer and safetensors. Nothing is
            downloaded, and no code of the folder is run.
    Returns:
        [N, h] float32.
    Raises:
        ConfigError: the folder lacks something of this, or the model cannot read the questions.
    """
    import torch  # seconds to import, as transformers is
    from torch.nn.utils.rnn import pad_sequence

    tokenizer, model = _load(folder)
    with library(KEY, str(folder), "cannot read the questions", "Give a model of texts, such as a sentence encoder"):
        encoded = tokenizer(list(questions), truncation=True, max_length=min(LONGEST, tokenizer.model_max_length))
        ids = [torch.tensor(one or [0]) for one in encoded["input_ids"]]
        by_length = sorted(range(len(ids)), key=lambda place: -len(ids[place]))
        batches = [by_length[start : start + BATCH] for start in range(0, len(ids), BATCH)]
        found = torch.zeros(len(ids), model.config.hidden_size)
        for places in tqdm(batches, desc="embed", unit="batch", mininterval=1, dynamic_ncols=True):
            tokens = pad_sequence([ids[place] for place in places], batch_first=True).to(model.device)
            mask = pad_sequence([torch.ones_like(ids[place]) for place in places], batch_first=True).to(model.device)
            with torch.inference_mode():
                hidden = model(input_ids=tokens, attention_mask=mask).last_hidden_state
            mean = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
            found[places] = torch.nn.functional.normalize(mean, dim=-1).cpu()
        if not bool(torch.isfinite(found).all()):
            raise ValueError("a hidden state is not finite")
    return found.numpy()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a model's folder.

    Raises:
        ConfigError: no such folder, something in it that is no model's file, or no safetensors.
    """
    require_model_files(KEY, folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(KEY, str(folder), "holds no *.safetensors", "Give a Hugging Face folder with them")
    return files


def _load(folder: Path) -> "tuple[PreTrainedTokenizerBase, PreTrainedModel]":
    import torch
    from transformers import AutoModel, AutoTokenizer

    local = {"local_files_only": True, "trust_remote_code": False}
    with library(KEY, str(folder), "transformers refuses it", "Give a Hugging Face folder"), held_stderr():
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **local)
        model, info = AutoModel.from_pretrained(
            str(folder), use_safetensors=True, dtype=torch.float32, output_loading_info=True, **local
        )
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))  # no hidden state is its
    if missing:
        rule = f"lacks weights of its model ({missing[0]})"
        raise ConfigError(KEY, str(folder), rule, "Copy its files again")
    return tokenizer, model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
