"""The parameters of one pipeline stage under the names that layout.py uses, whatever layers built them."""

from collections.abc import Iterator

from torch import Tensor, nn

from nemo_jepo.weights.layout import TE_NAMES


def named_stage_parameters(gpt: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(global Megatron name, parameter): layer numbers of the whole model, Transformer Engine's names undone.

    The last stage's copy of a tied embedding carries the embedding's name.
    """
    for name, parameter in gpt.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            layer = gpt.get_submodule(f"decoder.layers.{parts[2]}").layer_number - 1  # type: ignore[operator]
            inner = ".".join(parts[3:])
            yield f"decoder.layers.{layer}.{TE_NAMES.get(inner, inner)}", parameter
        elif name == "output_layer.weight" and gpt.share_embeddings_and_output_weights:
            yield "embedding.word_embeddings.weight", parameter
        else:
            yield name, parameter


def stage_parameters(gpt: nn.Module) -> dict[str, Tensor]:
    """The same as a mapping."""
    return dict(named_stage_parameters(gpt))
