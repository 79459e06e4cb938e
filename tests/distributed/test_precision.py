"""FP8 settings reach Megatron as they are meant, and what could not train in FP8 is refused; bf16 keeps fp32 sums."""

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from nemo_jepo.actor import model as actor_model
from nemo_jepo.actor import precision
from nemo_jepo.actor.actor import row_shape
from nemo_jepo.actor.model import load_hf_config, transformer_config
from nemo_jepo.actor.precision import assert_fp8_is_used, check_fp8, fp8_options
from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import ModelConfig
from tests.distributed.precision_jobs import bf16_update
from tests.support.hf_models import SHAPES
from tests.support.rank_pool import on_ranks

Tensors = dict[str, torch.Tensor]


def settings(**changes) -> ModelConfig:
    return ModelConfig(**{"fp8": "hybrid", "tokens_per_micro_batch": 128} | changes)


def config_of(model: ModelConfig) -> TransformerConfig:
    return TransformerConfig(num_layers=4, hidden_size=64, num_attention_heads=4, bf16=True, **fp8_options(model))


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a Hopper GPU and a recent Transformer Engine."""
    monkeypatch.setattr(precision, "transformer_engine_version", lambda: (2, 9))
    monkeypatch.setattr(precision, "gpu_capability", lambda: (9, 0))


def refusal(model: ModelConfig, trainer_precision: str = "bf16") -> str:
    with pytest.raises(ConfigError) as caught:
        check_fp8(model, trainer_precision)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- settings -------------------------------------------------------------------------------------------------


def test_without_fp8_no_option_is_given():
    assert fp8_options(ModelConfig()) == {}
    check_fp8(ModelConfig(), "fp32")


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
@pytest.mark.parametrize("format_", ["hybrid", "e4m3"])
def test_a_transformer_config_carries_format_and_recipe(format_, recipe):
    config = config_of(settings(fp8=format_, fp8_recipe=recipe))
    assert (config.fp8, config.fp8_recipe) == (format_, recipe)
    assert not config.first_last_layers_bf16


@pytest.mark.parametrize(
    ("engine", "capability", "dtype", "expected"),
    [
        (True, (9, 0), torch.bfloat16, "fused"),
        (True, (8, 0), torch.bfloat16, "auto"),
        (True, (9, 0), torch.float32, "auto"),
        (False, (9, 0), torch.bfloat16, "auto"),
    ],
)
def test_cudnns_attention_is_asked_for_where_it_takes_packed_rows(engine, capability, dtype, expected, monkeypatch):
    monkeypatch.setattr(actor_model, "has_transformer_engine", lambda: engine)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    config = transformer_config(load_hf_config(SHAPES["llama untied"]), ModelConfig(), dtype)
    assert config.attention_backend.name == expected


def test_a_transformer_config_carries_bf16_layers_and_fp8_weights():
    config = config_of(settings(first_last_layers_bf16=True, num_layers_at_end_in_bf16=2))
    assert config.first_last_layers_bf16
    assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (1, 2)


# ---- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_right_settings_on_a_right_machine_pass(recipe, gpu):
    check_fp8(settings(fp8_recipe=recipe), "bf16")


def test_fp8_without_transformer_engine_is_refused():
    line = refusal(settings())
    assert line.startswith("model.fp8='hybrid': FP8 needs Transformer Engine, which is not installed.")


@pytest.mark.parametrize(
    "recipe, version, passes",
    [
        ("tensorwise", (2, 1), False),
        ("tensorwise", (2, 2), True),
        ("blockwise", (2, 2), False),
        ("blockwise", (2, 3), True),
        ("blockwise", (2, 10), True),
    ],
)
def test_a_recipe_needs_its_transformer_engine(recipe, version, passes, gpu, monkeypatch):
    monkeypatch.setattr(precision, "transformer_engine_version", lambda: version)
    if passes:
        check_fp8(settings(fp8_recipe=recipe), "bf16")
    else:
        assert f"fp8_recipe='{recipe}': needs Transformer Engine 2." in refusal(settings(fp8_recipe=recipe))


@pytest.mark.parametrize("capability, recipe", [(None, "tensorwise"), ((8, 0), "tensorwise"), ((8, 9), "blockwise")])
def test_a_gpu_without_such_products_is_refused(capability, recipe, gpu, monkeypatch):
    monkeypatch.setattr(precision, "gpu_capability", lambda: capability)
    assert "needs compute capability" in refusal(settings(fp8_recipe=recipe))


def test_fp8_in_an_fp32_run_is_refused(gpu):
    assert refusal(settings(), "fp32").startswith("trainer.precision='fp32'")


@pytest.mark.parametrize(
    "tokens, layout, needed",
    [
        (120, {}, 16),
        (16, {"context_parallel_size": 2}, 32),
        (96, {"tensor_model_parallel_size": 4, "sequence_parallel": True}, 64),
        (64, {"tensor_model_parallel_size": 4, "sequence_parallel": True, "context_parallel_size": 2}, 128),
    ],
)
def test_a_share_of_a_row_that_is_no_multiple_of_16_tokens_is_refused(tokens, layout, needed, gpu):
    line = refusal(settings(tokens_per_micro_batch=tokens, **layout))
    assert line.startswith(f"model.tokens_per_micro_batch={tokens}") and f"multiple of {needed}." in line
    check_fp8(settings(tokens_per_micro_batch=needed, **layout), "bf16")


def test_blocks_of_sequence_parallel_shards_are_whole(gpu):
    """Others would be gathered in BF16 without a word."""
    layout = {"fp8_recipe": "blockwise", "tensor_model_parallel_size": 2, "sequence_parallel": True}
    assert "multiple of 256." in refusal(settings(tokens_per_micro_batch=384, **layout))
    check_fp8(settings(tokens_per_micro_batch=512, **layout), "bf16")
    assert row_shape(settings(tokens_per_micro_batch=512, **layout)).row_multiple % 256 == 0
    check_fp8(settings(tokens_per_micro_batch=32, **layout | {"fp8_recipe": "tensorwise"}), "bf16")


def test_tensor_parallelism_alone_does_not_cut_a_row(gpu):
    check_fp8(settings(tokens_per_micro_batch=16, tensor_model_parallel_size=4), "bf16")


# ---- the trap -------------------------------------------------------------------------------------------------


def transformer_engine_linear() -> nn.Module:
    """A linear layer whose class says that it comes from Transformer Engine."""
    base = type("Linear", (nn.Linear,), {"__module__": "transformer_engine.pytorch.module.linear"})
    return type("TEColumnParallelLinear", (base,), {"__module__": "megatron.core.extensions"})(4, 4)


class Router(nn.Linear):
    """Stands for megatron's router, which computes in fp32."""


def model_with(linear: nn.Module) -> nn.Module:
    layer = nn.ModuleDict({"norm": nn.RMSNorm(4), "router": Router(4, 4), "linear_qkv": linear})
    layers = nn.ModuleDict({"layers": nn.ModuleList([layer])})
    return nn.ModuleDict({"embedding": nn.Embedding(4, 4), "decoder": layers, "output_layer": nn.Linear(4, 4)})


def test_a_model_of_transformer_engine_layers_passes():
    assert_fp8_is_used(model_with(transformer_engine_linear()))


def test_the_first_layer_that_is_not_transformer_engines_is_named():
    with pytest.raises(ConfigError, match="layer='decoder.layers.0.linear_qkv': is Linear, not Transformer Engine's"):
        assert_fp8_is_used(model_with(nn.Linear(4, 4)))


# ---- real models ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "TP2"])
def found(request) -> tuple[Tensors, str]:
    return on_ranks(request.param, bf16_update)[0]


@pytest.fixture
def facts(found) -> Tensors:
    return found[0]


def test_megatrons_local_layers_are_refused(found):
    """They train silently without FP8 when model.fp8 is set."""
    assert "decoder.layers.0.self_attention.linear_proj': is RowParallelLinear" in found[1]


def test_bf16_weights_have_fp32_main_weights_moments_and_gradients(facts):
    dtypes = {name: tensor.dtype for name, tensor in facts.items()}
    assert {dtype for name, dtype in dtypes.items() if name.startswith("weight/")} == {torch.bfloat16}
    for kind in ("main/", "exp_avg/", "exp_avg_sq/", "gradient/"):
        assert {dtype for name, dtype in dtypes.items() if name.startswith(kind)} == {torch.float32}, kind


def test_gradients_of_micro_batches_are_summed_in_fp32(facts):
    """bf16 has 8 bits: a sum in bf16 would be a bf16 number, and this one is none."""
    gradient = facts["gradient/of two micro-batches"]
    assert not torch.equal(gradient, gradient.bfloat16().float())
    torch.testing.assert_close(
        gradient, facts["gradient/of the first"] + facts["gradient/of the second"], rtol=0, atol=0
    )


def test_an_update_too_small_for_bf16_is_kept_in_the_main_weights(facts):
    """A learning rate of 1e-6 leaves most bf16 weights where they were; their fp32 main weights move."""
    moved = (facts["main/after"] != facts["main/before"]).float().mean()
    rounded = (facts["main/after"].bfloat16() != facts["main/before"].bfloat16()).float().mean()
    assert moved > 0.9 and rounded < 0.1
