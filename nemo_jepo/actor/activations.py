"""Bytes that the model keeps of a token for its backward pass: what one forward for a whole batch has to hold.

With flash attention, no dropout, t tensor-parallel ranks, s = t with sequence parallelism and 1 without; h hidden size,
q, k widths of queries and of keys, f of the feed-forward layer (of one expert), A experts that a token visits. A layer
keeps, elements a token,

    4 h / s                     inputs and outputs of the two norms
    (2 q + 2 k) / t             query, key, value and the output of attention
    3 f / t                     input and output of SwiGLU (experts: A (3 f + 2 h), dispatched tokens included)

in the model's precision; FP8 keeps the inputs of matrix products in 1 byte. Full recompute keeps h / s of each layer.
The output head keeps h / s for the last norm, and h of hidden states, gathered. Source: Korthikanti et al., arXiv
2205.05198, sections 4 and 5, for LayerNorm and GELU; counted anew for RMSNorm, SwiGLU and grouped queries.
"""

from nemo_jepo.actor.weights.families import Shape
from nemo_jepo.config.layouts import stage_layers
from nemo_jepo.config.model import ModelConfig


def activation_bytes_per_token(shape: Shape, model: ModelConfig, dtype_bytes: int) -> float:
    """Bytes that this rank keeps of one token of its rows until the backward pass, all its layers and the head.

    A rank's rows have 1 / context_parallel_size of the tokens. Not counted: what the backward pass of one row makes
    and drops, and with shared prompts the prompt's keys and values, gathered for each sibling. Without Transformer
    Engine layers keep more: on a CPU in fp32 1.6 to 1.8 times as much, counted by saved_tensors_hooks.

    Args:
        dtype_bytes: of the model's precision.
    """
    layers = max(stage_layers(model, shape.num_layers))
    head = dtype_bytes * (shape.hidden_size / sequence_ranks(model) + shape.hidden_size)
    return layers * kept_of_layer(shape, model, dtype_bytes) + head


def kept_of_layer(shape: Shape, model: ModelConfig, dtype_bytes: int) -> float:
    """Bytes that one layer keeps of one token of a row from its forward to its backward pass, on one rank."""
    if model.activations_checkpoint_granularity == "full":
        return dtype_bytes * shape.hidden_size / sequence_ranks(model)
    return layer_activations(shape, model, dtype_bytes)  # selective recomputes what flash attention never keeps


def layer_activations(shape: Shape, model: ModelConfig, dtype_bytes: int) -> float:
    """The same without recompute: what a layer holds while its own backward pass runs."""
    tensor, sequence = model.tensor_model_parallel_size, sequence_ranks(model)
    norms = 4 * shape.hidden_size / sequence
    attention = (2 * shape.query_width + 2 * shape.key_value_width) / tensor
    if shape.num_experts:
        feed_forward = shape.experts_per_token * (3 * shape.inner_size + 2 * shape.hidden_size) / sequence
    else:
        feed_forward = 3 * shape.inner_size / tensor
    in_fp8 = 2 * shape.hidden_size / sequence + feed_forward / 3 - shape.query_width / tensor
    return dtype_bytes * (norms + attention + feed_forward) - (in_fp8 if model.fp8 else 0)


def sequence_ranks(model: ModelConfig) -> int:
    """s: tensor-parallel ranks that a row's tokens are cut over between the matrix products."""
    return model.tensor_model_parallel_size if model.sequence_parallel else 1
