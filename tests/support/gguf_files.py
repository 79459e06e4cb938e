"""GGUF files of tiny models, written as llama.cpp's converter writes them."""

import json
from pathlib import Path

import gguf
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.small_tokenizers import small_tokenizer

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}


def write_gguf(
    model: PreTrainedModel,
    file: Path,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    pre: str = "gpt-2",
    **extra: float,
) -> None:
    """A model with the byte-level tokenizer of these tests.

    Args:
        kind: how matrices are stored; vectors are fp32.
        pre: tokenizer.ggml.pre.
        extra: further floats, <architecture>.KEY.
    """
    config, family = model.config, model.config.model_type
    writer = gguf.GGUFWriter(file, family)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    if family == "llama":
        writer.add_rope_dimension_count(head_size)
    for key, value in extra.items():
        writer.add_float32(f"{family}.{key}", value)
    _write_tokenizer(writer, pre)
    names = gguf.get_tensor_name_map(ARCHITECTURES[family], config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if family == "llama" else {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if (num_heads := heads.get(name.split(".")[-2])) is not None:
            weight = interleaved(weight, num_heads)
        stored = gguf.GGMLQuantizationType.F32 if weight.dim() == 1 else kind
        data = gguf.quantize(weight.numpy(), stored)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(weight: Tensor, num_heads: int) -> Tensor:
    """Rows in the order of llama.cpp's rotary embedding: of each head 0, D/2, 1, D/2 + 1, ..."""
    half = weight.shape[0] // num_heads // 2
    order = [2 * half * head + i + half * j for head in range(num_heads) for i in range(half) for j in (0, 1)]
    return weight[order].contiguous()


def _write_tokenizer(writer: gguf.GGUFWriter, pre: str) -> None:
    tokenizer = small_tokenizer("byte_level")
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    special = set(tokenizer.all_special_tokens)
    types = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(CHAT_TEMPLATE)
