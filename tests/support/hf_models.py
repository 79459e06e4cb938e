"""Tiny Hugging Face models of every supported shape, and the sequences that they score."""

import dataclasses
import random
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from nemo_jepo.types import Spliced
from tests.distributed.batch import TINY, VOCAB, sequences

# The slowest frequencies have wavelengths over 8192: with so small a base, 200 tokens feel the scaling of them.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 3000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "llama": {"model_type": "llama"},
    "llama3": {"model_type": "llama", "rope_parameters": LLAMA3, "max_position_embeddings": 16384},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "qwen3_moe": EXPERTS | {"model_type": "qwen3_moe", "moe_intermediate_size": 24, "norm_topk_prob": True},
    "qwen3_moe, shares of all": EXPERTS | {"model_type": "qwen3_moe", "moe_intermediate_size": 24},
    "mixtral": EXPERTS | {"model_type": "mixtral"},
}
SHAPES = {
    # A padding id would hide its embedding row's gradient in transformers.
    f"{family} {head}": TINY | shape | {"tie_word_embeddings": head == "tied", "pad_token_id": None}
    for family, shape in FAMILIES.items()
    for head in ("tied", "untied")
}


def random_model(name: str) -> PreTrainedModel:
    """A model in which every weight matters: norms are not 1, biases are not 0."""
    shape = dict(SHAPES[name])
    torch.manual_seed(list(SHAPES).index(name))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.pop("model_type"), **shape)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def on_disk(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Its tensors under the names of its files: transformers keeps experts stacked, files one by one."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def save(model: PreTrainedModel, folder: Path, shard_bytes: int = 10**9) -> str:
    model.save_pretrained(folder, max_shard_size=shard_bytes)
    return str(folder)


def scored_sequences() -> list[Spliced]:
    """The batch of an update, and one sequence long enough to feel the rotary frequencies."""
    rng = random.Random(11)
    ids = tuple(rng.randrange(VOCAB) for _ in range(200))
    long = dataclasses.replace(
        sequences()[0], token_ids=ids, prompt_length=3, chain_length=190, answer_length=7, generation_logprobs=()
    )
    return [*sequences(), long]
