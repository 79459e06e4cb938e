"""What is measured: models, variants, a batch of proofs, and the FLOPs that it needs."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.step import Batch, Lengths, draw_sequences
from nemo_jepo.actor.model import load_hf_config
from nemo_jepo.actor.weights.families import Shape
from nemo_jepo.types import Spliced

PEAK_TFLOPS = {"bf16": 989.0, "fp8": 1979.0}
"""Dense peaks of one H100 SXM (NVIDIA's data sheet, without sparsity)."""
LLAMA3 = {"model_type": "llama", "vocab_size": 128_256, "max_position_embeddings": 131_072, "rope_theta": 500_000.0}
MODELS: dict[str, dict[str, Any]] = {
    "8b_shape": LLAMA3  # Llama 3.1 8B has 32 such layers
    | {
        "num_hidden_layers": 4,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "1b": LLAMA3  # Llama 3.2 1B, whole
    | {
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
}
TOY = {
    "vocab_size": 2048,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
}


@dataclass(frozen=True, slots=True)
class Variant:
    """How a model computes."""

    precision: str = "bf16"
    fp8: dict[str, Any] = field(default_factory=dict)
    """FP8 settings of the model; none for BF16."""

    @property
    def peak_tflops(self) -> float:
        """What its TFLOP/s are set against."""
        return PEAK_TFLOPS["fp8" if self.fp8 else "bf16"]


VARIANTS = {"bf16": Variant()} | {
    f"fp8 {recipe}": Variant(fp8={"fp8": "hybrid", "fp8_recipe": recipe}) for recipe in ("tensorwise", "blockwise")
}
DRY_VARIANTS = {"bf16": Variant(), "fp32": Variant(precision="fp32"), "fp8 tensorwise": VARIANTS["fp8 tensorwise"]}


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured; the defaults are a batch of proofs."""

    prompts: int = 16
    generations: int = 4
    tokens_per_row: int = 8192
    prompt_tokens: int = 200
    chain_tokens: int = 1000
    answer_tokens: int = 400
    updates: int = 4
    """Timed ones; one more comes first."""


DRY_SIZE = Size(4, 2, 256, prompt_tokens=8, chain_tokens=30, answer_tokens=10, updates=2)


@dataclass(frozen=True, slots=True)
class Job:
    """One process's work."""

    shape: dict[str, Any]
    variant: Variant
    size: Size


def proof_like_lengths(size: Size) -> Lengths:
    """Log-normal lengths with the size's means; a whole sequence always fits into a row."""
    rng = random.Random(7)

    def draw(mean: float, largest: int) -> list[int]:
        mu = math.log(mean) - 0.5**2 / 2
        return [min(largest, max(1, round(rng.lognormvariate(mu, 0.5)))) for _ in range(4096)]

    row = size.tokens_per_row
    return Lengths(
        draw(size.prompt_tokens, row // 8), draw(size.chain_tokens, row // 2), draw(size.answer_tokens, row // 4)
    )


def batch_of(size: Size) -> list[Spliced]:
    """The batch that every variant reads."""
    return draw_sequences(Batch(size.prompts, size.generations, size.tokens_per_row), proof_like_lengths(size))


def model_flops(shape: dict[str, Any], sequences: Sequence[Spliced]) -> float:
    """FLOPs of one forward and backward pass that the model needs, by its matrix products; a third of it forward.

        6 * (parameters in layers) * tokens + 6 * hidden * vocabulary * (scored tokens)
        + 12 * layers * (heads * head size) * sum over sequences of length^2 / 2

    The output head runs at scored tokens alone; the last term is attention, whose causal half is needed. Norms,
    lookups, padding, recomputed logits and the optimizer count for nothing.
    """
    model = Shape.of(load_hf_config(shape))
    hidden, queries, keys = model.hidden_size, model.num_heads * model.head_size, model.num_kv_heads * model.head_size
    layer = hidden * (2 * queries + 2 * keys) + 3 * hidden * model.inner_size
    tokens = sum(sequence.length for sequence in sequences)
    scored = sum(sequence.chain_length + sequence.answer_length for sequence in sequences)
    squares = sum(sequence.length**2 for sequence in sequences)
    products = 6 * model.num_layers * layer * tokens + 6 * hidden * model.vocab_size * scored
    return float(products + 12 * model.num_layers * queries * squares / 2)


def mean_nll_weights(sequences: Sequence[Spliced]) -> list[Tensor]:
    """Token weights under which the loss is the mean NLL of a scored token."""
    counts = [sequence.chain_length + sequence.answer_length for sequence in sequences]
    return [torch.full((count,), 1.0 / sum(counts)) for count in counts]
