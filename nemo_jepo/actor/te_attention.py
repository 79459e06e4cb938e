"""Core attention of packed rows through Transformer Engine; import it where the package is installed.

Shape letters: T tokens of a row on this rank, H heads on this rank, H_kv heads of keys and values, D head size.
"""

from megatron.core.extensions.transformer_engine import TEDotProductAttention, fused_apply_rotary_pos_emb
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from nemo_jepo.actor.attention import seen_keys
from nemo_jepo.actor.row import RowParams


class RowAttention(TEDotProductAttention):
    """`nemo_jepo.actor.attention` by Transformer Engine's kernels: fused rotation, then cuDNN or flash attention.

    Megatron's own call knows no mask for fewer queries than keys. So rows with shared prompts go to Transformer Engine
    directly: with padding_causal_bottom_right a segment's last query sees its last key.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None = None,
        packed_seq_params: RowParams | None = None,
        num_splits: int | None = None,
    ) -> Tensor:
        """Attention output [T, H * D] of query [T, H, D] and key, value [T, H_kv, D]."""
        assert packed_seq_params is not None, "the actor feeds packed rows only"
        row = packed_seq_params
        query, key = (
            fused_apply_rotary_pos_emb(tensor[:, None], row.both_angles, interleaved=False)[:, 0]
            for tensor in (query, key)
        )
        if not row.shares_prompts:
            return super().forward(query, key, value, attention_mask, attn_mask_type, packed_seq_params=row)
        key, value = seen_keys(key, value, row)
        return super(TEDotProductAttention, self).forward(
            query,
            key,
            value,
            attention_mask,
            qkv_format="thd",
            attn_mask_type="padding_causal_bottom_right",
            cu_seqlens_q=row.cu_seqlens_q,
            cu_seqlens_kv=row.cu_seqlens_kv,
            max_seqlen_q=row.max_seqlen_q,
            max_seqlen_kv=row.max_seqlen_kv,
        )
