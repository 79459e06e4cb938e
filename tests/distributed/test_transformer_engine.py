"""Transformer Engine's layers in the actor, built by its own Python without its kernels: names, weights, settings.

What it computes is shown on a GPU alone (tests/gpu).
"""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from nemo_jepo.actor.model import load_hf_config
from nemo_jepo.actor.weights.families import Shape
from nemo_jepo.actor.weights.load import SeededWeights, hf_shapes
from nemo_jepo.actor.weights.names import model_parameters
from nemo_jepo.config.layouts import BLOCKWISE_TOKENS
from tests.distributed.transformer_engine_jobs import ENGINE, FAMILIES, LOCAL, ROWS
from tests.support.hf_models import SHAPES
from tests.support.ranks import ROOT, run_ranks
from tests.support.te_stub import FOLDER

if not FOLDER.is_dir():
    pytest.skip("Transformer Engine's Python is not here: `make te-stub` fetches it", allow_module_level=True)

PROGRAM = """
import sys
from tests.support import te_stub
te_stub.install()
from tests.distributed import transformer_engine_jobs
transformer_engine_jobs.main(sys.argv[1])
"""
NUM_LAYERS = 4  # of each shape

ATTENTION = {
    "self_attention.core_attention": "RowAttention",
    "self_attention.linear_qkv": "TELayerNormColumnParallelLinear",
    "self_attention.linear_proj": "TERowParallelLinear",
}
QK_NORMS = {"self_attention.q_layernorm": "RMSNorm", "self_attention.k_layernorm": "RMSNorm"}
MLP = {"mlp.linear_fc1": "TELayerNormColumnParallelLinear", "mlp.linear_fc2": "TERowParallelLinear"}
EXPERTS = {
    "pre_mlp_layernorm": "RMSNorm",
    "mlp.router": "TopKRouter",
    "mlp.experts.linear_fc1": "TEColumnParallelGroupedLinear",
    "mlp.experts.linear_fc2": "TERowParallelGroupedLinear",
}
LAYER = {
    "llama": ATTENTION | MLP,
    "qwen2": ATTENTION | MLP,
    "qwen3": ATTENTION | QK_NORMS | MLP,
    "qwen3_moe": ATTENTION | QK_NORMS | EXPERTS,
    "mixtral": ATTENTION | EXPERTS,
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, dict[str, Any]]:
    file = tmp_path_factory.mktemp("transformer_engine") / "found.json"
    run_ranks(1, ["-c", PROGRAM, str(file)], environment={"CUDA_VISIBLE_DEVICES": ""}, forked=False)
    return json.loads(file.read_text())


@pytest.fixture
def found(parts) -> Callable[[str], Any]:
    """What a part of the process found."""

    def of(name: str) -> Any:
        assert "found" in parts[name], parts[name]["raised"]
        return parts[name]["found"]

    return of


def test_it_is_the_version_of_the_image(found):
    image = re.search(r"^ARG TRANSFORMER_ENGINE_VERSION=(\S+)$", (ROOT / "containers/Dockerfile").read_text(), re.M)
    assert image is not None and found("version") == image[1]


# ---- layers and weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_family_by_name_and_shape(family, found):
    config = load_hf_config(SHAPES[family])
    source = SeededWeights(hf_shapes(config), 0.02, seed=0)
    expected = {p.name: list(p.entry.read_shard(source, 0, 1).shape) for p in model_parameters(Shape.of(config))}
    assert found(f"layers of {family}")["parameters"] == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_with_weights_is_transformer_engines_but_for_the_router(family, found):
    classes = found(f"layers of {family}")["classes"]
    of_one = LAYER[family.split()[0]]
    expected = {f"layers.{n}.{name}": kind for n in range(NUM_LAYERS) for name, kind in of_one.items()}
    assert {name: kind for name, (kind, _) in classes.items()} == expected | {"final_layernorm": "RMSNorm"}
    assert {kind for kind, is_transformer_engines in classes.values() if not is_transformer_engines} <= {"TopKRouter"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hugging_face_folder_is_loaded_and_streamed_bit_for_bit(family, found):
    names = list(hf_shapes(load_hf_config(SHAPES[family])))
    assert found(f"weights of {family}") == {"names": names, "lost": []}


@pytest.mark.parametrize("writer", [ENGINE, LOCAL])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_one_kind_of_layers_is_read_by_the_other(family, writer, found):
    assert found(f"{family} from {writer}") == []


# ---- FP8 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "layers", "format_"),
    [
        ("tensorwise", ["Float8CurrentScaling E4M3"] * 4, "e4m3"),
        ("blockwise", ["Float8BlockScaling HYBRID"] * 4, "hybrid"),
        (
            "tensorwise, the first and the last in bf16",
            ["bf16", *["Float8CurrentScaling HYBRID"] * 2, "bf16"],
            "hybrid",
        ),
        ("blockwise, the last two in bf16", [*["Float8BlockScaling HYBRID"] * 2, "bf16", "bf16"], "hybrid"),
    ],
)
def test_fp8_settings_become_transformer_engines_recipes_and_can_be_left_out(settings, layers, format_, found):
    by_time, with_fp8 = found(f"fp8, {settings}"), {"layers": layers, "configs": [format_]}
    assert by_time["set"] == by_time["afterwards"] == with_fp8
    assert by_time["without"] == {"layers": ["bf16"] * NUM_LAYERS, "configs": ["None"]}


def test_experts_enter_and_leave_fp8_with_their_layers(found):
    with_fp8 = {"layers": ["Float8BlockScaling HYBRID"] * NUM_LAYERS, "configs": ["hybrid"]}
    without = {"layers": ["bf16"] * NUM_LAYERS, "configs": ["None"]}
    assert found("fp8 of experts") == {"set": with_fp8, "without": without, "afterwards": with_fp8}


def test_a_checkpoint_of_delayed_scaling_goes_on_with_todays_recipe(found):
    """Earlier versions had it, and Transformer Engine keeps its state beside the weights."""
    state = found("state of delayed scaling")
    assert state == {"read": ["Float8Quantizer"], "next pass": ["Float8CurrentScalingQuantizer"]}


def test_blockwise_scaling_gathers_shards_of_whole_blocks_in_fp8(found):
    assert found("tokens of FP8 gathers") == list(range(BLOCKWISE_TOKENS, 513, BLOCKWISE_TOKENS))


# ---- Megatron's config -------------------------------------------------------------------------------------------

LLAMA_8B = {"num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "num_attention_heads": 32}
LLAMA_70B = {"num_layers": 80, "hidden_size": 8192, "ffn_hidden_size": 28672, "num_attention_heads": 64}
ON_ONE_NODE = {
    **{"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1, "sequence_parallel": True},
    **{"virtual_pipeline_model_parallel_size": None, "batch_p2p_comm": True, "overlap_p2p_comm": False},
}
ON_EIGHT_NODES = {
    **{"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 4, "sequence_parallel": True},
    **{"virtual_pipeline_model_parallel_size": 5, "batch_p2p_comm": False, "overlap_p2p_comm": True},
}
IN_FP8 = {
    "fp8": "hybrid",
    "fp8_recipe": "tensorwise",
    "fp8_param": False,
    "first_last_layers_bf16": True,
    "num_layers_at_start_in_bf16": 1,
    "num_layers_at_end_in_bf16": 1,
}
ON_A_GPU = {
    "num_query_groups": 8,
    "kv_channels": 128,
    "normalization": "RMSNorm",
    "bias_activation_fusion": True,
    "use_te_activation_func": False,
    "use_cpu_initialization": False,
    "bf16": True,
    "params_dtype": "torch.bfloat16",
    "pipeline_dtype": "torch.bfloat16",
    "calculate_per_token_loss": True,
    "attention_backend": "fused",
    "recompute_granularity": None,
}


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("jepo_8b", LLAMA_8B | ON_ONE_NODE | {"fp8": None}),
        ("jepo_8b_fp8", LLAMA_8B | ON_ONE_NODE | IN_FP8),
        ("jepo_70b", LLAMA_70B | ON_EIGHT_NODES | {"fp8": None}),
        ("jepo_70b_fp8", LLAMA_70B | ON_EIGHT_NODES | IN_FP8),
    ],
)
def test_the_gpu_recipes_give_configs_that_megatron_accepts(recipe, expected, found):
    config = found(f"recipe {recipe}")
    assert {name: config[name] for name in expected | ON_A_GPU} == expected | ON_A_GPU


def test_in_bf16_transformer_engine_has_cudnns_attention_or_none(found):
    attention = found(f"bf16 attention, {ENGINE}")
    assert (attention["layers"], attention["backend"]) == (["RowAttention"], "fused")
    assert attention["variables"] == ["0", "1", "0"]  # flash, fused, unfused
    assert [attention[f"{row}, cuDNN"] for row in ROWS] == ["fused"] * 3
    assert [attention[f"{row}, no cuDNN"] for row in ROWS] == ["none"] * 3


def test_fp32_has_local_layers_for_transformer_engine_has_slow_attention_or_none(found):
    attention = found(f"fp32 attention, {ENGINE}")
    assert [attention[f"{row}, cuDNN"] for row in ROWS] == ["unfused", "unfused", "none"]
    assert attention["layers"] == ["PackedAttention"]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_layer_of_an_fp32_model_is_transformer_engines(family, found):
    """Experts too: their products are grouped in Transformer Engine alone."""
    assert found(f"fp32 layers of {family}") == []


def test_local_layers_leave_the_choice_to_megatron(found):
    assert {found(f"{precision} attention, {LOCAL}")["backend"] for precision in ("bf16", "fp32")} == {"auto"}
