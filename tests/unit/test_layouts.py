"""Each rule between a model's shape and its parallel layout, by the line it gives."""

import re
from typing import Any

import pytest

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.layouts import check_layout, stage_layers
from nemo_jepo.config.schema import ModelConfig

SHAPE = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96, "num_hidden_layers": 12}
EXPERTS = SHAPE | {"num_experts": 6, "intermediate_size": 95}  # an expert is never cut
TP, PP, VPP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
PASSES = "update_passes"
CP, EP, SP, ROW = "context_parallel_size", "expert_model_parallel_size", "sequence_parallel", "tokens_per_micro_batch"


@pytest.mark.parametrize(
    ("settings", "shape", "beginning"),
    [
        ({TP: 3}, SHAPE, "model.tensor_model_parallel_size=3: must divide num_attention_heads=8"),
        ({TP: 8}, SHAPE, "model.tensor_model_parallel_size=8: must divide num_key_value_heads=4"),
        ({TP: 4}, SHAPE | {"intermediate_size": 90}, "model.tensor_model_parallel_size=4: must divide intermediate"),
        ({PP: 5}, SHAPE, "model.pipeline_model_parallel_size=5: 12 of num_hidden_layers=12 are left for 5 equal"),
        ({PP: 4, FIRST: 2}, SHAPE, "model.pipeline_model_parallel_size=4: 10 of num_hidden_layers=12 are left for 3"),
        ({PP: 2, FIRST: 5, LAST: 6}, SHAPE, "model.pipeline_model_parallel_size=2: 1 of num_hidden_layers=12 are left"),
        ({PP: 3, FIRST: 9, LAST: 9}, SHAPE, "model.pipeline_model_parallel_size=3: -6 of num_hidden_layers=12"),
        ({FIRST: 6}, SHAPE, "model.pipeline_model_parallel_size=1: has no first and last stage to tell apart"),
        ({VPP: 2}, SHAPE, "model.virtual_pipeline_model_parallel_size=2: interleaves pipeline stages"),
        ({PP: 2, VPP: 1}, SHAPE, "model.virtual_pipeline_model_parallel_size=1: one chunk a stage"),
        ({PP: 2, VPP: 4}, SHAPE, "model.virtual_pipeline_model_parallel_size=4: must divide the 6 layers of a stage"),
        ({PP: 3, VPP: 2, LAST: 2}, SHAPE, "model.virtual_pipeline_model_parallel_size=2: must divide the 5 layers"),
        ({CP: 2, ROW: 4098}, SHAPE, "model.tokens_per_micro_batch=4098: context parallelism deals a row over 2"),
        ({TP: 4, SP: True, ROW: 4098}, SHAPE, "model.tokens_per_micro_batch=4098: sequence parallelism shards"),
        ({TP: 4, CP: 2, SP: True, ROW: 4100}, SHAPE, "model.tokens_per_micro_batch=4100: sequence parallelism shards"),
        ({PP: 2, PASSES: "one"}, SHAPE, "model.update_passes='one': a pipeline's stages score before they train"),
        (
            {PASSES: "one", "fp8": "hybrid", "fp8_guard_action": "bf16"},
            SHAPE,
            "model.update_passes='one': with model.fp8_guard_action=bf16 scoring may leave FP8",
        ),
        ({EP: 2}, SHAPE, "model.expert_model_parallel_size=2: this model has no experts"),
        ({EP: 4}, EXPERTS, "model.expert_model_parallel_size=4: must divide num_experts=6"),
        ({TP: 2}, EXPERTS, "model.sequence_parallel=False: experts take each token once"),
    ],
)
def test_a_broken_rule_names_its_key(settings: dict[str, Any], shape, beginning):
    with pytest.raises(ConfigError, match="^" + re.escape(beginning)):
        check_layout(ModelConfig(**settings), shape)


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({}, [12]),
        ({PP: 4}, [3, 3, 3, 3]),
        ({PP: 2, FIRST: 5}, [5, 7]),
        ({PP: 4, FIRST: 2, LAST: 2}, [2, 4, 4, 2]),
        ({PP: 4, LAST: 3, VPP: 3}, [3, 3, 3, 3]),
        ({PP: 2, FIRST: 4, LAST: 8, VPP: 4}, [4, 8]),
    ],
)
def test_layers_are_dealt_out_as_the_settings_say(settings, layers):
    model = ModelConfig(**settings)
    check_layout(model, SHAPE)
    assert stage_layers(model, 12) == layers


@pytest.mark.parametrize(
    "settings", [{TP: 2, SP: True, EP: 3}, {PP: 2, EP: 6}, {CP: 4, EP: 2}, {TP: 4, CP: 2, SP: True}]
)
def test_layouts_of_experts_that_fit(settings):
    check_layout(ModelConfig(**settings), EXPERTS)


@pytest.mark.parametrize(
    ("settings", "world_size", "replicas"),
    [({TP: 2, CP: 2}, 8, 2), ({PP: 2, CP: 4}, 8, 1), ({EP: 4}, 8, 8), ({TP: 2, EP: 4, PP: 2}, 8, 2)],
)
def test_replicas_are_what_tensor_pipeline_and_context_ranks_leave(settings, world_size, replicas):
    assert ModelConfig(**settings).data_parallel_size(world_size) == replicas


@pytest.mark.parametrize(
    ("settings", "beginning"),
    [
        ({CP: 3}, "model.tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size=3: must"),
        ({PP: 2, EP: 3}, "model.expert_model_parallel_size=3: must divide the 4 ranks of a pipeline stage"),
    ],
)
def test_a_layout_must_fit_the_ranks(settings, beginning):
    with pytest.raises(ConfigError, match="^" + re.escape(beginning)):
        ModelConfig(**settings).data_parallel_size(8)
