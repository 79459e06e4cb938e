"""A GGUF file, llama.cpp's format, as a Hugging Face folder: config.json, fp32 safetensors, tokenizer, chat template.

The numbers are those that the file's blocks stand for, so the folder is as exact as the file and no more: a model that
was quantised stays so. What the file says about the model is read in full or refused: a key or a tensor that is not
known here might change what the model computes.
"""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import pre_tokenizers
from torch import Tensor

from nemo_jepo.actor.model import load_hf_config
from nemo_jepo.actor.weights.families import FAMILIES, Shape
from nemo_jepo.actor.weights.load import hf_shapes
from nemo_jepo.checkpoint.hf.export import export_hf
from nemo_jepo.config.errors import ConfigError

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
"""<architecture>.KEY of the file -> key of config.json."""
TOKENS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
"""tokenizer.ggml.KEY_token_id -> key of config.json."""
DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
SPLITS: Mapping[str | None, pre_tokenizers.PreTokenizer | None] = {
    None: None,  # SentencePiece has none
    "gpt-2": None,
    "llama-bpe": None,
    "qwen2": None,
    "smollm": DIGITS,
}
"""tokenizer.ggml.pre -> what cuts a text before its pieces are merged; None: what transformers makes of that name. It
takes a name that it does not know for GPT-2's, whose tokens are others ("\\n\\n4" is three tokens, not two)."""
FIX = "Use the model's Hugging Face folder"


def write_hf_folder(file: Path, folder: Path) -> None:
    """Write a GGUF file as a new Hugging Face folder, which appears when it is whole; one tensor is held at a time.

    Raises:
        ConfigError: gguf is not installed; the file cannot be read, is of another family than
            `nemo_jepo.actor.weights.families` lists, or says something that is not known here; the disk is full.
        FileExistsError: the folder exists.
    """
    reader = open_gguf(file)
    config = hf_config_of(file, reader)
    shapes, tensors = hf_shapes(config), tensors_by_hf_name(file, reader, config)
    with tempfile.TemporaryDirectory() as companions:
        config.save_pretrained(companions)
        tokenizer_of(file, reader).save_pretrained(companions)
        export_hf(weights(tensors, shapes, config), shapes, torch.float32, folder, Path(companions))


def refuse(file: Path, rule: str, fix: str = FIX) -> ConfigError:
    """What is wrong with a file."""
    return ConfigError("GGUF", str(file), rule, fix)


def open_gguf(file: Path) -> "GGUFReader":
    """The file, mapped; no tensor is read."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise refuse(file, "gguf is not installed", "pip install 'nemo_jepo[gguf]', or pip install gguf") from error
    try:
        return GGUFReader(file)
    except Exception as error:  # a file that is cut off fails wherever it ends
        raise refuse(file, f"cannot be read ({error})", "Copy the file again") from error


def hf_config_of(file: Path, reader: "GGUFReader") -> "PretrainedConfig":
    """The model's shape. Floats are the shortest decimals that the file's float32 stands for: 1e-05, not 9.99e-06."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    family = contents(reader, "general.architecture")
    known = [name for name, entry in FAMILIES.items() if entry.experts is None]
    if family not in known:
        raise refuse(file, f"architecture {family!r} is not one of {', '.join(known)}", "Use a model of these families")
    settings: dict[str, Any] = {"model_type": family, "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]]}
    for key, name in KEYS.items():
        value = contents(reader, f"{family}.{key}")
        if isinstance(value, float):
            value = float(str(torch.tensor(value).numpy()))
        if value is not None and settings.setdefault(name, value) != value:
            raise refuse(file, f"{family}.{key}={value} where another key says {name}={settings[name]}")
    for key in reader.fields:
        if key.startswith(f"{family}.") and key.removeprefix(f"{family}.") not in KEYS:
            raise refuse(file, f"{key} might change what the model computes, and is not read here")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    settings["tie_word_embeddings"] = "output.weight" not in tensors
    if "token_embd.weight" in tensors:
        settings["vocab_size"] = int(tensors["token_embd.weight"].shape[1])
    for key, name in TOKENS.items():
        settings[name] = contents(reader, f"tokenizer.ggml.{key}_token_id")
    config = load_hf_config(settings)
    config.dtype = torch.float32
    return config


def contents(reader: "GGUFReader", key: str) -> Any:
    """A value of the file's metadata; None where it has none of that key."""
    return None if (field := reader.get_field(key)) is None else field.contents()


def tensors_by_hf_name(file: Path, reader: "GGUFReader", config: "PretrainedConfig") -> dict[str, "ReaderTensor"]:
    """The file's tensors under Hugging Face's names: all that the model has and no other, each of its shape."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = next(number for number, name in MODEL_ARCH_NAMES.items() if name == config.model_type)
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    held = {tensor.name: tensor for tensor in reader.tensors}
    found: dict[str, ReaderTensor] = {}
    for name, shape in hf_shapes(config).items():
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if own not in held:
            raise refuse(file, f"tensor {own} ({name}) is missing", "Copy the file again")
        found[name] = held.pop(own)
        if (stored := tuple(reversed(found[name].shape.tolist()))) != shape:
            raise refuse(file, f"tensor {own} has shape {stored}, the metadata asks for {shape}")
    if held:
        raise refuse(file, f"tensor {min(held)} is not part of this architecture ({config.model_type})")
    return found


def weights(
    tensors: Mapping[str, "ReaderTensor"], shapes: Mapping[str, tuple[int, ...]], config: "PretrainedConfig"
) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face's name, fp32 tensor), in the order of `shapes`."""
    from gguf import dequantize

    shape = Shape.of(config)
    heads = {"q_proj": shape.num_heads, "k_proj": shape.num_kv_heads} if config.model_type == "llama" else {}
    for name in shapes:
        stored = tensors[name]
        weight = torch.tensor(dequantize(stored.data, stored.tensor_type), dtype=torch.float32)
        num_heads = heads.get(name.split(".")[-2])
        yield name, weight if num_heads is None else halves(weight, num_heads)


def halves(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of query or key heads in Hugging Face's order.

    llama.cpp rotates channels 2i and 2i + 1 of a Llama's head together, Hugging Face i and i + D/2: row 2i + j of a
    head becomes row i + j D/2.

    Args:
        weight: [num_heads * D, ...].
    """
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def tokenizer_of(file: Path, reader: "GGUFReader") -> "PreTrainedTokenizerBase":
    """The file's tokenizer with its chat template."""
    from transformers import AutoTokenizer

    kind = contents(reader, "tokenizer.ggml.pre")
    if kind not in SPLITS or (kind is None and contents(reader, "tokenizer.ggml.model") != "llama"):
        rule = f"tokenizer.ggml.pre={kind!r} is not known here ({', '.join(str(name) for name in SPLITS if name)} are)"
        raise refuse(file, rule)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(file.absolute().parent), gguf_file=file.name, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers checks a tokenizer in many places, with many exceptions
        raise refuse(file, f"transformers cannot make its tokenizer ({error})") from error
    if (split := SPLITS[kind]) is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = split
    # transformers reads these itself from 5.18 on; before it takes the first token of a turn for the last.
    tokens = contents(reader, "tokenizer.ggml.tokens")
    for key, name in TOKENS.items():
        if (number := contents(reader, f"tokenizer.ggml.{key}_token_id")) is not None:
            setattr(tokenizer, name.removesuffix("_id"), tokens[number])
    return tokenizer
