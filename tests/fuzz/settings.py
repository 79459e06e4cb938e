"""Command lines: every key of the schema with wrong values, and what Hydra's grammar and options make of them."""

import contextlib
import io
import json
import math
import os
from typing import Any

from hypothesis import strategies as st

from nemo_jepo.config import compose
from nemo_jepo.config.check import check_fields
from tests.fuzz.nasty import LEAVES, values, words
from tests.fuzz.runner import Campaign

FRAGMENTS = [
    "${",
    "${oc.env:HOME}",
    "${oc.env:NO_SUCH_VARIABLE}",
    "${a}",
    "${trainer}",
    "${model.hf_config}",
    "${model.optim.betas}",
    "${model}",
    "${trainer.devices}",
    "${model.optim.lr}",
    "${exp_manager.name}",
    "${hydra:runtime.cwd}",
    "${oc.create:{a:1}}",
    "${oc.decode:'['}",
    "${" * 300,
    "${.}",
    "${..}",
    "[",
    "]",
    "{a:",
    "{a: {b: {c: 1}}}",
    "{1: 2, null: 3}",
    "{a: 1, a: 2}",
    "[" * 500 + "]" * 500,
    "{a:" * 300 + "1" + "}" * 300,
    "'",
    '"',
    "'a",
    "\\",
    "a\\,b",
    "a,b",
    "1,2,3",
    "range(1,10)",
    "choice(a,b)",
    "glob(*)",
    "interval(0,1)",
    "int(3)",
    "float(x)",
    "str([1])",
    "sort(3,2,1)",
    "shuffle(1,2)",
    "extend_list(1)",
    "tag(a,1)",
    "???",
    "null",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "1e308",
    "-1e308",
    "9" * 400,
    "9" * 5000,
    "0x10",
    "1_000",
    "on",
    "~",
    "@",
    "=",
    "==",
    ":",
    "%",
    "!!python/object:os.system",
    "&a",
    "*a",
    "#",
    "|",
    "a" * 5000,
    "a/" * 3000,
    "../../x",
    "/",
    ".",
    "..",
    "/etc",
    "/etc/passwd",
    "/dev/zero",
    "\0",
    "a\0b",
    "\ud800",
    "\n",
    "\u2028",
    "\U0001f600",
    " ",
    "",
]
RAW = [
    "",
    "=",
    "~key",
    "~model",
    "~trainer.devices",
    "~data.arithmetic",
    "+key",
    "+key=1",
    "++key=1",
    "+a.b.c=1",
    "key",
    "@x=1",
    "objective@x=rloo",
    "objective@model=rloo",
    "+objective@=rloo",
    "objective=no_such",
    "objective=[jepo,rloo]",
    "objective=null",
    "~objective",
    "rollout=vllm",
    "rollout=vllm_colocated",
    "data=gsm8k",
    "data=jsonl",
    "data=reasoning_gym",
    "experiment=x",
    "hydra.run.dir=x",
    "hydra.verbose=1",
    "hydra.x=1",
    "+hydra.x=1",
    "hydra/launcher=x",
    "hydra.searchpath=[file:///no]",
    "hydra.searchpath=3",
    "hydra.job.name=${a}",
    "--config-name",
    "--config-name=",
    "--config-name=no_such",
    "--config-name=../conf/demo",
    "--config-name=" + "a" * 300,
    "--config-name=schema\ud800",
    "--config-path",
    "--config-path=/no/such",
    "--config-path=/dev/null",
    "--config-path=" + "a" * 5000,
    "--config-dir=.",
    "--package",
    "--package=model",
    "--package=no.such",
    "--package=_global_",
    "--cfg",
    "--cfg=job",
    "--cfg=hydra",
    "--cfg=all",
    "--cfg=x",
    "--resolve",
    "--info=defaults",
    "--info=x",
    "--hydra-help",
    "--help",
    "--multirun",
    "--run",
    "--experimental-rerun=/etc/passwd",
    "--shell-completion",
    "--model",
    "--model=x",
    "--no-such",
    "-c",
    "-x",
    "--",
    "-",
]
KEYS = [*compose.KEYS, "model.hf_config.vocab_size", "model.hf_config.a.b", "no.such", "model.", ".", "a" * 300]
SHAPE_KEYS = [
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "head_dim",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rms_norm_eps",
    "eos_token_id",
    "tie_word_embeddings",
    "hidden_act",
    "layer_types",
    "dtype",
    "torch_dtype",
    "auto_map",
    "architectures",
    "attention_bias",
    "use_sliding_window",
    "max_position_embeddings",
    "quantization_config",
    "cls",
    "self",
]


def _text(value: Any) -> str:
    """A value in the grammar of overrides; a text half of the time as it is."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{_text(key)}:{_text(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_text, value)) + "]"
    if isinstance(value, str):
        return value if len(value) % 2 else "'" + value.replace("'", "\\'") + "'"
    return "null" if value is None else "9" * 5000 if value == 10**400 else str(value)


typed = st.sampled_from(FRAGMENTS) | st.sampled_from(LEAVES).map(_text) | values.map(_text) | words
overrides = st.builds(
    lambda sign, key, equals, text: f"{sign}{key}{equals}{text}",
    st.sampled_from(["", "", "", "", "+", "++", "~"]),
    st.sampled_from(KEYS),
    st.sampled_from(["="] * 9 + ["", ":", "@x="]),
    typed,
)
shapes = st.builds(
    lambda family, changes: "model.hf_config=" + _text({"model_type": family} | changes),
    st.sampled_from(["llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gpt2", "", 3, None, []]),
    st.dictionaries(st.sampled_from(SHAPE_KEYS), st.sampled_from([4, 8, 64]) | values, max_size=5),
)
inside_shape = st.builds(
    lambda key, text: f"++model.hf_config.{key}={text}",
    st.sampled_from(SHAPE_KEYS),
    typed | st.sampled_from(["0", "-4", "4.0", "[4]", "{a: 1}", "true", "'4'", "100000000000", "nan", "1"]),
)
command_lines = st.builds(
    lambda recipe, lines: ["--config-name", *recipe, *lines],
    st.sampled_from([["demo"]] * 5 + [["jepo"], ["jepo_tiny", "data=arithmetic", "trainer.devices=1"]]),
    st.lists(st.one_of(*[overrides] * 5, inside_shape, shapes, st.sampled_from(RAW)), min_size=1, max_size=2),
)


def read(argv: list[str]) -> None:
    """As `nemo-jepo train` reads its command line, and what it makes of the shape before a model is built."""
    from nemo_jepo.actor.model import load_hf_config
    from nemo_jepo.actor.weights.load import hf_shapes
    from nemo_jepo.config.layouts import check_layout

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            config = compose.read_command_line(argv)
        except SystemExit as end:  # of --help and --version
            assert not end.code, f"exit code {end.code}"
            return
    if config is None:
        return
    _check_result(config)
    if config.model.hf_config:
        hf_config = load_hf_config(config.model.hf_config)
        check_layout(config.model, hf_config.to_dict())
        if hf_config.num_hidden_layers * (getattr(hf_config, "num_local_experts", None) or 1) < 3000:
            hf_shapes(hf_config)


def _check_result(config: Any) -> None:
    """An accepted config is one that every rule accepts, whose folder is inside exp_dir."""
    check_fields(config)
    inside = os.path.relpath(os.path.abspath(config.run_folder), os.path.abspath(config.exp_manager.exp_dir))
    assert inside != "." and not inside.startswith(".."), inside
    assert all(math.isfinite(value) for _, value in compose.flatten(_plain(config)) if isinstance(value, float))


def _plain(config: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    found = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def prepare() -> None:
    """Import what is slow to import."""
    with contextlib.suppress(Exception):
        read(["--config-name", "demo"])


SETTINGS = Campaign(
    command_lines, read, share=0.4, prepare=prepare, parse=lambda content: json.loads(content), limit_s=30.0
)
