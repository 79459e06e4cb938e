"""What the embedded sampler gives a transformers model in the place of its own: a cache, and attention over it.

N rows, T new tokens of each, S columns of the cache, D the size of a head. Any model that transformers serves with its
attention interface can be given both: the model's own code stays what it is.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

GROUPED = "nemo_jepo_grouped"
"""`attn_implementation` of a model that attends by `grouped_attention`."""

BLOCK = 64
"""Columns that a layer gets at a time."""


class Layer(DynamicLayer):
    """One layer's keys and values of N rows, written in place.

    A prompt without its last token lies at the left; what follows it, at columns that all rows have in common:

        columns   0 .. len - 2      len - 1 .. width - 1    width ..
        hold      the prompt        nothing, masked         its last token, then the completion

    Args:
        num_rows: N.
        width: tokens of the longest prompt, its last not counted.
    """

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        self._num_rows = num_rows
        self._num_columns = width

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes room, for heads like these. Zeros, because a masked column counts 0 times what it holds."""
        self.keys, self.values = (
            states.new_zeros(self._num_rows, states.shape[1], self._num_columns + BLOCK, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def put_prompts(self, first_row: int, copies: Tensor, prompts: CacheLayerMixin) -> None:
        """Row first_row + i gets the keys and values of prompt copies[i]."""
        if not self.is_initialized:
            self.lazy_initialization(prompts.keys, prompts.values)
        rows, length = slice(first_row, first_row + len(copies)), prompts.keys.shape[2]
        self.keys[rows, :, :length] = prompts.keys[copies]
        self.values[rows, :, :length] = prompts.values[copies]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Adds the keys and values of one token a row, and returns all so far. The model calls this."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._num_columns == self.keys.shape[2]:
            self.keys, self.values = (pad(kept, (0, 0, 0, BLOCK)) for kept in (self.keys, self.values))
        self.keys[:, :, self._num_columns] = key_states.squeeze(2)
        self.values[:, :, self._num_columns] = value_states.squeeze(2)
        self._num_columns += 1
        return self.keys[:, :, : self._num_columns], self.values[:, :, : self._num_columns]


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **unused: object,
) -> tuple[Tensor, None]:
    """Causal attention within prompts, or attention of one token a row; no key or value is copied for its queries.

    One token's queries that share a key-value head stand beside one another, as rows of one product.

    Args:
        query: [N, heads, T, D].
        key: [N, KV heads, S, D], as value; S = T unless T = 1.
        attention_mask: for T = 1: [N, 1, 1, S], added to the scores; None where the token sees every column.
    Returns:
        ([N, T, heads, D], None)
    """
    if query.shape[2] > 1:
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    else:
        rows = query.reshape(*key.shape[:2], -1, query.shape[3])
        out = scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask, scale=scaling).view(query.shape)
    return out.transpose(1, 2), None


AttentionInterface.register(GROUPED, grouped_attention)
