"""Bytes against closed forms worked out by hand."""

import dataclasses

import pytest

from nemo_jepo.actor.activations import activation_bytes_per_token, layer_activations
from nemo_jepo.config import compose
from nemo_jepo.config.schema import ModelConfig, OptimConfig
from nemo_jepo.rollout.vllm import channels
from nemo_jepo.tools.plan.estimate import cluster_of, estimate
from nemo_jepo.tools.plan.hardware import GIB, gpu_named
from nemo_jepo.tools.plan.memory import (
    NCCL_BUFFER_BYTES,
    RESERVED,
    SAMPLER_RESERVED,
    TrainerMemory,
    activations,
    fixed_parts,
    keeps_graph,
    layers_in_flight,
    optimizer_bytes,
    output_head,
    sampler_memory,
    stage_parameters,
    trainer_phases,
    weight_bytes,
)
from nemo_jepo.tools.plan.shape import ModelShape
from nemo_jepo.tools.plan.workload import MeanLengths

# h 8, q 8, k 4, f 16, V 32, 4 layers. Attention 8*(8+8)+8*8 = 192; feed-forward 3*8*16 = 384; norms 16.
SHAPE = ModelShape(
    model_type="llama", num_layers=4, hidden_size=8, inner_size=16, num_heads=4, num_kv_heads=2, head_size=2,
    vocab_size=32, tied=False, num_experts=0, experts_per_token=0,
)  # fmt: skip
EXPERTS = dataclasses.replace(SHAPE, model_type="mixtral", num_experts=4, experts_per_token=2)
RUN = TrainerMemory(world_size=4, precision="bf16", num_micro_batches=8, keeps_reference=False, batch_tokens=512)


def layout(tensor=1, pipeline=1, **more):
    more = {"sequence_parallel": tensor > 1} | more
    sizes = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    return ModelConfig(**sizes, tokens_per_micro_batch=64, logprob_chunk_tokens=16, **more)


def test_parameters_of_the_stages_are_those_of_the_model():
    """Four layers of 192 + 384 + 16, embedding and output matrix of 256 each, last norm 8."""
    assert SHAPE.num_parameters == 4 * 592 + 512 + 8
    assert sum(stage.total for stage in stage_parameters(SHAPE, layout())) == SHAPE.num_parameters
    assert [stage.total for stage in stage_parameters(SHAPE, layout(pipeline=2))] == [1184 + 256, 1184 + 256 + 8]


def test_tensor_parallelism_halves_matrices_and_copies_norms():
    (stage,) = stage_parameters(SHAPE, layout(tensor=2))
    assert stage.total == (4 * 576 + 512) / 2 + 4 * 16 + 8


def test_a_tied_output_matrix_costs_nothing_on_one_stage_and_a_copy_on_two():
    tied = dataclasses.replace(SHAPE, tied=True)
    assert stage_parameters(tied, layout())[0].total == 4 * 592 + 256 + 8
    assert stage_parameters(tied, layout(pipeline=2))[1].total == 2 * 592 + 256 + 8


def test_experts_are_dealt_out_whole():
    """Four experts of 384 in each of 4 layers; router 4 * 8 in every rank's layers."""
    (stage,) = stage_parameters(EXPERTS, layout(tensor=2, expert_model_parallel_size=4))
    assert stage.experts == 4 * 384
    assert stage.dense == (4 * 192 + 512) / 2 + 4 * (16 + 32) + 8


@pytest.mark.parametrize(
    ("precision", "distributed", "bytes_each"),
    [("bf16", True, 2 + 4 + 12 / 4), ("bf16", False, 18), ("fp32", True, 8 + 8 / 4), ("fp32", False, 16)],
)
def test_bytes_a_parameter_are_those_of_megatrons_table(precision, distributed, bytes_each):
    """Megatron Core user guide, "Distributed Optimizer": 18, 6 + 12/d, 16, 8 + 8/d, here for d = 4."""
    model = layout(optim=OptimConfig(distributed=distributed))
    (stage,) = stage_parameters(SHAPE, model)
    size = 2 if precision == "bf16" else 4
    total = weight_bytes(stage, model, size) + 4 * stage.total + optimizer_bytes(stage, model, 4, precision)
    assert total == bytes_each * SHAPE.num_parameters


def test_optimizer_state_of_experts_is_shared_by_fewer_ranks():
    """Eight ranks, TP 2: 4 copies of everything else; EP 4: 2 copies of each expert."""
    model = layout(tensor=2, expert_model_parallel_size=4)
    (stage,) = stage_parameters(EXPERTS, model)
    assert optimizer_bytes(stage, model, 8, "bf16") == 12 * (stage.dense / 4 + stage.experts / 2)


def test_fp8_keeps_every_matrix_twice():
    (stage,) = stage_parameters(SHAPE, layout())
    assert weight_bytes(stage, layout(fp8="hybrid"), 2) == 2 * SHAPE.num_parameters + 2 * 4 * 576


@pytest.mark.parametrize(
    ("model", "elements"),
    [
        (layout(), 4 * 8 + 16 + 8 + 3 * 16),
        (layout(tensor=2), (4 * 8 + 16 + 8 + 3 * 16) / 2),
        (layout(tensor=2, sequence_parallel=False), 4 * 8 + (16 + 8 + 3 * 16) / 2),
    ],
)
def test_activations_of_a_layer(model, elements):
    assert layer_activations(SHAPE, model, 2) == 2 * elements


def test_activations_of_experts_count_every_visit():
    assert layer_activations(EXPERTS, layout(), 2) == 2 * (4 * 8 + 16 + 8 + 2 * (3 * 16 + 2 * 8))


def test_fp8_stores_inputs_of_matrix_products_in_one_byte():
    """Norms 2 h and SwiGLU's output f lose a byte; the attention's output q is kept in both precisions."""
    assert layer_activations(SHAPE, layout(fp8="hybrid"), 2) == layer_activations(SHAPE, layout(), 2) - (16 + 16) + 8


def test_full_recompute_keeps_the_inputs_of_layers_and_one_layer():
    model = layout(activations_checkpoint_granularity="full")
    assert activations(SHAPE, model, 8, 2) == 64 * (4 * 2 * 8 + layer_activations(SHAPE, layout(), 2))
    assert activations(SHAPE, layout(), 8, 2) == 64 * 4 * layer_activations(SHAPE, layout(), 2)


def test_a_token_of_a_row_is_kept_by_every_layer_of_its_rank_and_by_the_head():
    """Of h = 8: last norm and hidden states; two tensor-parallel ranks cut the norm's input, never the states."""
    model, cut = layout(), layout(tensor=2)
    assert activation_bytes_per_token(SHAPE, model, 2) == 4 * layer_activations(SHAPE, model, 2) + 2 * (8 + 8)
    assert activation_bytes_per_token(SHAPE, cut, 2) == 4 * layer_activations(SHAPE, cut, 2) + 2 * (4 + 8)
    recomputed = layout(activations_checkpoint_granularity="full")
    assert activation_bytes_per_token(SHAPE, recomputed, 2) == 4 * 2 * 8 + 2 * (8 + 8)
    uneven = layout(pipeline=2, num_layers_in_first_pipeline_stage=3, num_layers_in_last_pipeline_stage=1)
    assert activation_bytes_per_token(SHAPE, uneven, 2) == 3 * layer_activations(SHAPE, uneven, 2) + 2 * (8 + 8)


@pytest.mark.parametrize(
    ("model", "rows", "layers"),
    [
        (layout(), 8, 4),
        (layout(pipeline=4), 8, 4),
        (layout(pipeline=4), 2, 2),
        (layout(pipeline=2, virtual_pipeline_model_parallel_size=2), 8, 4 * (1 + 1 / 4)),
    ],
)
def test_the_first_stage_holds_as_many_rows_as_there_are_stages(model, rows, layers):
    """Korthikanti et al., section 4.2.3: p rows of L/p layers, interleaved L (1 + (p - 1)/(p v))."""
    assert layers_in_flight(model, 4, rows) == layers


def test_the_output_head_is_one_chunk_and_its_gradients():
    """16 tokens by 32 columns in 4 + 2 bytes; 64 tokens of 8, and their gradient in fp32 and in bf16. The gradient of
    the output matrix is where the optimizer keeps it anyway."""
    assert output_head(SHAPE, layout(), 2, training=False) == 16 * 32 * 6 + 64 * 8 * 2
    assert output_head(SHAPE, layout(), 2, training=True) == 16 * 32 * 6 + 64 * 8 * (2 + 4 + 2)


def phases(model, run=RUN):
    return {phase.name: phase for phase in trainer_phases(SHAPE, model, run, 100 * GIB)}


def test_the_training_phase_is_the_sum_of_its_parts():
    model = layout(update_passes="two")
    training, count = phases(model)["training"], SHAPE.num_parameters
    head, kept = output_head(SHAPE, model, 2, training=True), activations(SHAPE, model, 8, 2)
    assert training.total == count * (2 + 4 + 12 / 4) + RESERVED + head + kept
    assert set(training.parts) == {"weights", "gradients", "optimizer", "reserved", "activations", "output head"}


def test_one_forward_pass_keeps_the_activations_of_all_rows():
    """512 tokens in rows of at most 64: scoring holds all of them and what one layer makes, training the same."""
    model = layout()
    kept = 512 * activation_bytes_per_token(SHAPE, model, 2) + 64 * layer_activations(SHAPE, model, 2)
    one = phases(model)
    assert one["log-probs"].parts["activations"] == one["training"].parts["activations"] == kept
    two = phases(layout(update_passes="two"))
    assert two["training"].parts["activations"] == activations(SHAPE, model, 8, 2)


def test_one_forward_pass_is_made_where_half_of_the_free_memory_holds_its_activations():
    run, model = RUN, layout()
    fixed = sum(fixed_parts(SHAPE, model, run).values())
    enough = fixed + 2 * 512 * activation_bytes_per_token(SHAPE, model, 2)
    assert keeps_graph(SHAPE, model, run, enough)
    assert not keeps_graph(SHAPE, model, run, enough - 1)
    assert keeps_graph(SHAPE, layout(update_passes="one"), run, enough - 1)
    assert not keeps_graph(SHAPE, layout(update_passes="two"), run, enough)
    assert not keeps_graph(SHAPE, layout(pipeline=2, update_passes="one"), run, 100 * enough)


def test_a_resident_reference_policy_costs_its_weights_in_every_phase():
    with_reference = dataclasses.replace(RUN, keeps_reference=True)
    cpu, gpu = phases(layout(), with_reference), phases(layout(reference_policy="gpu"), with_reference)
    assert all(gpu[name].total - cpu[name].total == 2 * SHAPE.num_parameters for name in cpu)
    assert "reference log-probs" not in phases(layout())


@pytest.mark.parametrize(
    ("overrides", "num_kept"),
    [
        (["objective=jepo", "kl.beta=0"], 0),
        (["objective=jepo"], 1),
        (["objective=dpo"], 0),  # the reference policy is the policy
        (["objective=dpo", "dpo.sync_reference=false"], 1),
        (["objective=dpo", "rollout.sync_interval=5"], 1),  # it is what the sampler has
        (["objective=dpo", "rollout.sync_interval=5", "dpo.sync_reference=false"], 2),
        (["objective=dpo", "rollout.sync_interval=null", "dpo.sync_reference=false"], 2),
        (["objective=jepo", "rollout.sync_interval=5", "objective.importance_sampling=token_truncated"], 2),
        (
            ["objective=jepo", "rollout.sync_interval=5", "objective.importance_sampling=token_truncated", "kl.beta=0"],
            1,
        ),
    ],
)
def test_a_plan_counts_the_policies_that_the_trainer_keeps(overrides, num_kept):
    phases_with = {}
    for place in ("cpu", "gpu"):
        settings = [*overrides, f"model.reference_policy={place}", "model.update_passes=two"]
        config = compose.resolve(compose.compose("jepo_8b", settings))
        cluster = cluster_of(config, gpu_named("h100"), 8, None, 0)
        phases_with[place] = estimate(config, cluster, MeanLengths()).trainer_memory
    for in_host_memory, resident in zip(phases_with["cpu"], phases_with["gpu"], strict=True):
        assert resident.total - in_host_memory.total == num_kept * resident.parts["weights"], resident.name


def test_the_cache_of_a_server_gets_what_is_left():
    """A token takes 2 * 4 layers * 4 * 2 bytes = 64, split over two GPUs."""
    memory = sampler_memory(SHAPE, 2, 0.5, longest=100, memory=20 * GIB, dtype_bytes=2)
    cache = 10 * GIB - SHAPE.num_parameters - SAMPLER_RESERVED
    assert memory.phase.parts["key-value cache"] == cache
    assert memory.cached_tokens == cache // 32
    assert memory.phase.total == memory.phase.capacity


def test_key_value_heads_are_copied_where_there_are_more_gpus_than_heads():
    two, four = (sampler_memory(SHAPE, ranks, 0.5, 100, 20 * GIB, 2) for ranks in (2, 4))
    assert four.cached_tokens == pytest.approx(two.cached_tokens, rel=1e-3)


def test_a_server_without_room_for_one_sequence_is_short():
    memory = sampler_memory(SHAPE, 1, 0.5, longest=2**26, memory=20 * GIB, dtype_bytes=4)
    needed = 4 * SHAPE.num_parameters + SAMPLER_RESERVED + 2**26 * 128
    assert memory.phase.short == max(0, needed - 10 * GIB)
    assert sampler_memory(SHAPE, 1, 0.5, 2**27, 20 * GIB, 4).phase.short > 0


def test_a_push_needs_room_at_both_ends():
    """Two buffers each; a server's hold the largest tensor (32 x 8) beside what fills them. 576 parameters a layer."""
    (sync,) = (phase for phase in trainer_phases(SHAPE, layout(), RUN, GIB) if phase.name == "weight sync")
    assert sync.parts["gathered weights"] == 2 * 2 * 576 and "packed weights" not in sync.parts
    feeding = dataclasses.replace(RUN, feeds_servers=True)
    (sync,) = (phase for phase in trainer_phases(SHAPE, layout(), feeding, GIB) if phase.name == "weight sync")
    assert sync.parts["packed weights"] == 2 * NCCL_BUFFER_BYTES == 2 * channels.NCCL_BUFFER_BYTES
    server = sampler_memory(SHAPE, 1, 0.9, 10, 80 * GIB, 2).phase
    assert server.parts["arriving weights"] == 2 * (NCCL_BUFFER_BYTES + 2 * 256)
    assert server.capacity == pytest.approx(72 * GIB + server.parts["arriving weights"]) and not server.short
    assert sampler_memory(SHAPE, 1, 0.999, 10, 80 * GIB, 2).phase.short > 0
