"""The parameters on this rank under the names of names.py, whatever chunks, stages and layers hold them."""

import re
from collections.abc import Iterable, Iterator

from torch import nn

from nemo_jepo.actor.parallel import Layout

# Transformer Engine folds a norm into the linear layer that follows it.
_TE_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
# One linear layer per expert (SequentialMLP), or one grouped layer with a weight per expert (TEGroupedMLP).
_LOCAL_EXPERT = re.compile(r"mlp\.experts\.(?:local_experts\.(?P<outer>\d+)\.)?(?P<linear>\w+)\.weight(?P<inner>\d*)")


def named_parameters(chunks: Iterable[nn.Module], layout: Layout) -> Iterator[tuple[str, nn.Parameter]]:
    """(name in the whole model, parameter) of every chunk on this rank.

    Args:
        chunks: GPTModels, unwrapped. Each layer knows its number in the whole model (`layer_number`, from 1), so
            virtual and uneven pipeline stages need no arithmetic here.
    Yields:
        The last stage's copy of a tied embedding carries the embedding's name.
    """
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                layer = chunk.get_submodule(f"decoder.layers.{parts[2]}")
                inner = _inner_name(".".join(parts[3:]), layer, layout)
                yield f"decoder.layers.{layer.layer_number - 1}.{inner}", parameter  # type: ignore[operator]
            elif name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
                yield "embedding.word_embeddings.weight", parameter
            else:
                yield name, parameter


def _inner_name(name: str, layer: nn.Module, layout: Layout) -> str:
    """A parameter's name inside its layer as names.py writes it."""
    expert = _LOCAL_EXPERT.fullmatch(name)
    if expert is None:
        return _TE_NORMS.get(name, name)
    num_local: int = layer.get_submodule("mlp.experts").num_local_experts  # type: ignore[assignment]
    number = layout.expert_group.rank() * num_local + int(expert["outer"] or expert["inner"])
    return f"mlp.experts.{number}.{expert['linear']}.weight"
