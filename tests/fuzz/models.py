"""Folders of a model whose files are damaged: weights and their index, config.json, the tokenizer's files."""

import functools
import json
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import AnswerConfig, DataConfig, ModelConfig
from nemo_jepo.data.files import Row
from tests.fuzz.nasty import changed, damaged, values, written
from tests.fuzz.runner import Campaign

TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 320,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "eos_token_id": 1,
    "torch_dtype": "float32",
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 1e5,
}
CONFIGS: list[dict[str, Any]] = [
    {"model_type": "llama"} | TINY,
    {"model_type": "llama", "rope_scaling": LLAMA3} | TINY,
    {"model_type": "qwen2"} | TINY,
    {"model_type": "qwen3", "head_dim": 4} | TINY,
    {"model_type": "qwen3_moe", "head_dim": 4} | EXPERTS | TINY,
    {"model_type": "mixtral"} | EXPERTS | TINY,
    {"model_type": "llama", "auto_map": {"AutoConfig": "evil.Evil"}, "configuration_files": ["config.4.0.0.json"]}
    | TINY,
]
HOSTILE = {"auto_map": {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
EVIL = "import pathlib\npathlib.Path(__file__).with_name('executed').touch()\nclass Evil: pass\n"


@functools.cache
def place() -> Path:
    """Where the inputs lie; it goes with the process."""
    holder = tempfile.TemporaryDirectory(prefix="nemo_jepo_fuzz_models_")
    place.holder = holder  # type: ignore[attr-defined]
    return Path(holder.name)


def fresh(name: str) -> Path:
    """An empty folder, with code in it that nobody may run."""
    folder = place() / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "evil.py").write_text(EVIL)
    return folder


def _parse(content: bytes) -> dict[str, bytes]:
    """A file of the corpus: the files of a folder as a JSON object, name -> text in Latin-1."""
    return {name: text.encode("latin-1") for name, text in json.loads(content).items()}


def _parse_weights(content: bytes) -> dict[str, bytes]:
    """Likewise, where @data@ stands for the data of the whole file, and @whole@ for all of it."""
    header, data = weights()
    parts = {b"@data@": data, b"@whole@": packed(header, data)}
    files = _parse(content)
    for mark, part in parts.items():
        files = {name: text.replace(mark, part) for name, text in files.items()}
    return files


# ---- config.json


def read_config(content: bytes) -> None:
    """As train, plan and import read a config.json."""
    from nemo_jepo.actor.model import load_hf_config
    from nemo_jepo.actor.weights.load import hf_shapes
    from nemo_jepo.config.layouts import check_layout
    from nemo_jepo.config.shapes import model_shape
    from nemo_jepo.tools.plan.shape import shape_of

    folder = fresh("config")
    (folder / "config.json").write_bytes(content)
    faults = []
    try:
        shape = model_shape(ModelConfig(), str(folder))
        assert shape is not None
        assert shape_of(shape).num_parameters > 0
    except ConfigError as error:
        faults.append(error)
    try:
        config = load_hf_config(str(folder))
        check_layout(ModelConfig(), config.to_dict())
        if config.num_hidden_layers * (getattr(config, "num_local_experts", None) or 1) < 3000:
            assert all(length > 0 for shape in hf_shapes(config).values() for length in shape)
    except ConfigError as error:
        faults.append(error)
    assert not (folder / "executed").exists()
    if faults:
        raise faults[-1]


configs = st.sampled_from(CONFIGS).flatmap(
    lambda base: st.one_of(
        changed(base, most=1).map(written),
        changed(base, most=2).map(written),
        changed(base).map(written),
        changed(base | HOSTILE, most=1).map(written),
        damaged(written(base), most=2),
        values.map(written) | st.binary(max_size=100),
    )
)
CONFIG = Campaign(configs, read_config, share=1.0)


# ---- weights


@functools.cache
def weights() -> tuple[dict[str, Any], bytes]:
    """The header and the data of a whole model.safetensors of CONFIGS[0]."""
    from safetensors.torch import save_file

    file = place() / "whole.safetensors"
    save_file(_state(), file)
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _state() -> dict[str, Any]:
    import torch

    from nemo_jepo.actor.model import load_hf_config
    from nemo_jepo.actor.weights.load import hf_shapes

    return {name: torch.full(shape, 0.5) for name, shape in hf_shapes(load_hf_config(CONFIGS[0])).items()}


def packed(header: Any, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file with this header; `length` is what it says of the header's length."""
    text = written(header)
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def read_weights(files: dict[str, bytes]) -> None:
    """As import and train read a folder's weights."""
    from nemo_jepo.actor.model import load_hf_config
    from nemo_jepo.actor.weights.hf_folder import SafetensorsFolder
    from nemo_jepo.actor.weights.load import hf_shapes

    folder = fresh("weights")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    shapes = hf_shapes(load_hf_config(CONFIGS[0]))
    source = SafetensorsFolder(folder)
    source.check(shapes)
    for name, shape in shapes.items():
        assert tuple(source.read(name).shape) == shape
        source.read(name, 0, 0, 1).sum().item()


@st.composite
def headers(draw: st.DrawFn) -> dict[str, bytes]:
    """A file whose header was changed, or lies about offsets, shapes, types, names or its own length."""
    header, data = weights()
    name, other = draw(st.sampled_from(sorted(set(header) - {"__metadata__"}))), draw(st.sampled_from(sorted(header)))
    entry = header[name]
    begin, end = entry["data_offsets"]
    lies = [
        {"data_offsets": [end, begin]},
        {"data_offsets": [begin, end - 1]},
        {"data_offsets": [begin, 2**63]},
        {"data_offsets": [-1, end]},
        {"data_offsets": [0, len(data)]},
        {"data_offsets": header[other].get("data_offsets", [0])},
        {"shape": [2**32, 2**32]},
        {"shape": [2**63, 2]},
        {"shape": [-1, -1]},
        {"shape": []},
        {"shape": [0]},
        {"shape": entry["shape"][::-1]},
        *(
            {"dtype": dtype}
            for dtype in ("F64", "I8", "BF16", "F8_E4M3", "F4", "F6_E2M3", "C64", "U16", "BOOL", "", "x")
        ),
        {"extra": 1},
    ]
    lied = header | {name: entry | draw(st.sampled_from(lies))}
    text = written(header)
    doubled = text[:-1] + b"," + written({name: entry})[1:]
    kind = draw(st.sampled_from(["change", "change", "change", "lie", "lie", "length", "double", "bytes", "raw"]))
    length = draw(st.sampled_from([0, 1, 7, len(text) - 1, len(text) + 1, 10**8, 2**31, 2**63, 2**64 - 1]))
    content = {
        "change": lambda: packed(draw(changed(header)), data),
        "lie": lambda: packed(lied, data),
        "length": lambda: packed(header, data, length),
        "double": lambda: struct.pack("<Q", len(doubled)) + doubled + data,
        "bytes": lambda: draw(damaged(packed(header, data))),
        "raw": lambda: packed(draw(values), draw(st.sampled_from([b"", data]))),
    }[kind]()
    return {"model.safetensors": content}


@st.composite
def indexes(draw: st.DrawFn) -> dict[str, bytes]:
    """A whole file, and an index that was changed or names other places."""
    header, data = weights()
    names = sorted(set(header) - {"__metadata__"})
    index: dict[str, Any] = {"metadata": {"total_size": len(data)}, "weight_map": dict.fromkeys(names, "a.safetensors")}
    where = draw(
        st.sampled_from(["../a.safetensors", "/etc/passwd", "..", ".", "", "a\0b", "x" * 300, "evil.py", "/dev/zero"])
    )
    if draw(st.booleans()):
        index["weight_map"][draw(st.sampled_from(names))] = where
    content = draw(
        changed(index).map(written) | damaged(written(index)) | st.just(written(index)) | values.map(written)
    )
    return {"a.safetensors": packed(header, data), "model.safetensors.index.json": content}


def prepare() -> None:
    """Make the whole file."""
    weights()


SAFETENSORS = Campaign(
    headers() | headers() | indexes(), read_weights, share=1.5, parse=_parse_weights, prepare=prepare
)


# ---- tokenizer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = [
    TEMPLATE,
    "",
    "{{",
    "{% for %}",
    "{{ messages[99].x.y }}",
    "{{ raise_exception('no') }}",
    "{{ 1 / 0 }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ lipsum.__globals__['os'].system('touch executed') }}",
    "{% include 'evil.py' %}",
    "{% import 'os' as os %}",
    "{{ messages | map(attribute='nope') | list }}",
    "{{ messages.append(1) }}",
    "{{ range(10**9) | list }}",
    "{{ ('a' * 10**6) }}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "(" * 5000,
    "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
    "{{ messages | tojson }}" * 50,
    "\0",
    "{{ strftime_now('%Q' * 9) }}",
]


@functools.cache
def tokenizer_files() -> tuple[dict[str, bytes], ...]:
    """The files of whole tokenizers, of the kinds that models have."""
    from tests.support.small_tokenizers import small_tokenizer

    found = []
    for kind in ("byte_level", "metaspace_always", "llama_like", "byte_level_nfc"):
        folder = fresh("tokenizer")
        small_tokenizer(kind).save_pretrained(folder)
        found.append({file.name: file.read_bytes() for file in folder.iterdir() if file.name != "evil.py"})
    return tuple(found)


@st.composite
def tokenizers(draw: st.DrawFn) -> dict[str, bytes]:
    """A tokenizer's files, one of them changed; sometimes with a chat template, or files of older kinds."""
    files = dict(draw(st.sampled_from(tokenizer_files())))
    if draw(st.booleans()):
        files["chat_template.jinja"] = draw(st.sampled_from(TEMPLATES) | st.text(max_size=40)).encode(
            "utf-8", "replace"
        )
    older = [
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
        "config.json",
    ]
    if draw(st.integers(0, 3)) == 0:
        name = draw(st.sampled_from(older))
        files[name] = draw(values.map(written) | st.binary(max_size=60) | st.just(written(CONFIGS[0])))
    if draw(st.integers(0, 5)) == 0:
        del files[draw(st.sampled_from(sorted(files)))]
    if files:
        name = draw(st.sampled_from(sorted(files)))
        content = files[name]
        change = damaged(content)
        if name.endswith(".json") and content.startswith(b"{"):
            base = json.loads(content)
            change = changed(base).map(written) | change | changed(base | HOSTILE, most=1).map(written)
        files[name] = draw(change)
    return files


def read_tokenizer(files: dict[str, bytes]) -> None:
    """As train reads a tokenizer and writes prompts by it."""
    from nemo_jepo.data.prompts import prompts_of_rows
    from nemo_jepo.data.splice import Splicer
    from nemo_jepo.data.tokenizer import load_tokenizer

    folder = fresh("tokenizer")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    rows = [Row("rows", 1, "What is 6 * 7?", "42"), Row("rows", 2, "\U0001f600 <|im_end|>\ufdd0 \u00e9", "x" * 99)]
    faults = []
    for use_chat_template in (False, True):
        try:
            tokenizer = load_tokenizer(str(folder), use_chat_template)
            config = DataConfig(use_chat_template=use_chat_template)
            assert len(list(prompts_of_rows(rows, config, tokenizer, AnswerConfig()))) == 2
            Splicer(tokenizer, AnswerConfig()).marker_end([0, 1, 2])
        except ConfigError as error:
            faults.append(error)
    assert not (folder / "executed").exists() and not Path("executed").exists()
    if len(faults) == 2:
        raise faults[0]


TOKENIZER = Campaign(
    st.deferred(tokenizers), read_tokenizer, share=1.0, parse=_parse, prepare=lambda: tokenizer_files(), limit_s=30.0
)
