"""Lengths and time against closed forms and numerical integrals."""

import math

import pytest

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import Config, ModelConfig
from nemo_jepo.data.packing import RowShape, pack
from nemo_jepo.tools.plan.calibration import (
    ENDLESS_SHARE,
    LINK_EFFICIENCY,
    MATMUL_EFFICIENCY,
    OURS,
    Software,
)
from nemo_jepo.tools.plan.generation import Sampler
from nemo_jepo.tools.plan.hardware import GPUS, gpu_named
from nemo_jepo.tools.plan.training import BACKWARD, ROUNDING, SCORING, TRAINING, Rows, Trainer
from nemo_jepo.tools.plan.workload import SHARED_FILL, Generations, MeanLengths, Workload, workload_of
from nemo_jepo.types import Spliced
from tests.unit.plan.published import SHAPES

H100 = GPUS["h100"]
SHAPE = SHAPES["Llama 8B"]
WORK = Workload(64, 4, 200, Generations(400, 1000), 100, 1500)
ROW = Rows(count=8, tokens=4096, context=700, scored_share=5 / 7)


@pytest.mark.parametrize(("mean", "longest"), [(400, 1000), (10, 1000), (999, 1000), (1000, 1000), (20, 4096)])
def test_lengths_have_the_mean_that_was_asked_for(mean, longest):
    """mean = integral of P(length > t); mean square = integral of 2 t P(length > t)."""
    lengths, steps = Generations(mean, longest), 20000
    points = [(step + 0.5) * longest / steps for step in range(steps)]
    width = longest / steps
    assert sum(lengths.longer_than(t) for t in points) * width == pytest.approx(mean, rel=1e-3)
    assert sum(2 * t * lengths.longer_than(t) for t in points) * width == pytest.approx(lengths.mean_square, rel=1e-3)
    assert lengths.longer_than(longest) == 0


def test_some_generations_never_stop():
    assert Generations(100, 4096).longer_than(4095) == pytest.approx(ENDLESS_SHARE, rel=1e-6)


def test_means_are_half_of_the_longest_unless_given():
    config = Config()
    work = workload_of(config, MeanLengths(generated=100))
    assert (work.prompt, work.generations.mean, work.answer) == (512, 100, 512)
    assert work.trained_tokens == 64 * 4 * (512 + 100 + 512)
    with pytest.raises(ConfigError, match="^--generated-tokens=2000: must be positive and at most rollout.max_tokens"):
        workload_of(config, MeanLengths(generated=2000))


def test_an_unknown_gpu_is_named():
    with pytest.raises(ConfigError, match="^--gpu='v100': known are h100"):
        gpu_named("v100")


def test_without_sharing_every_token_is_computed_and_sees_half_of_its_sequence():
    """Sequences of 700 tokens on average; context is E[length^2] / E[length] of 300 fixed tokens and a generation."""
    computed = WORK.computed(None)
    square = 300**2 + 2 * 300 * 400 + WORK.generations.mean_square
    assert computed.tokens == WORK.trained_tokens == 64 * 4 * 700
    assert computed.context == pytest.approx(square / 700)
    assert computed.scored_share == pytest.approx(500 / 700)


def test_a_shared_prompt_is_computed_once_and_its_keys_are_seen_by_every_sample():
    """Equal lengths: 199 shared tokens, 1 + 400 + 100 = 501 own ones. Pairs are counted token by token."""
    work = Workload(64, 4, 200, Generations(400, 400), 100, 1500)
    shared = work.computed(4096)
    assert shared.tokens == 64 * (199 + 4 * 501)
    pairs = sum(range(199)) + 4 * sum(199 + token for token in range(501)) + (199 + 4 * 501) / 2  # half of itself
    assert shared.context == pytest.approx(2 * pairs / (199 + 4 * 501))
    assert shared.scored_share == pytest.approx(4 * 500 / (199 + 4 * 501))


@pytest.mark.parametrize(("row", "copies"), [(4096, 1), (199 + 3 * 501, 2), (199 + 2 * 501, 2), (700, 4)])
def test_a_group_that_does_not_fit_into_a_row_has_its_prompt_in_each_of_several(row, copies):
    work = Workload(64, 4, 200, Generations(400, 400), 100, 1500)
    assert work.computed(row).tokens == 64 * (copies * 199 + 4 * 501)


def test_the_arithmetic_is_what_the_packer_does():
    """Groups of equal lengths, rows that hold 8 samples beside their prompt, 5 or 2."""
    prompt, own = (1,) * 200, (2,) * 500
    group = [
        Spliced(
            group=0, sample=sample, token_ids=prompt + own, prompt_length=200, chain_length=400, answer_length=100,
            valid=True, has_marker=True, generation_logprobs=(0.0,) * 400,
        )
        for sample in range(8)
    ]  # fmt: skip
    work = Workload(1, 8, 200, Generations(400, 400), 100, 1500)
    for tokens in (4207, 2704, 1201):
        rows = pack(group, RowShape(tokens, share_prompts=True))
        assert sum(len(row.token_ids) for row in rows) == work.computed(tokens).tokens


def trainer(world_size=8, software=OURS, **model):
    return Trainer(SHAPE, ModelConfig(**model), H100, world_size, 8, software)


def test_matrix_products_of_a_forward_pass_take_flop_over_rate():
    seconds = trainer().row(ROW, 32, True, SCORING)
    rate = MATMUL_EFFICIENCY["bf16"] * 989e12
    assert seconds["matrix products"] == pytest.approx(2 * 32 * SHAPE.active_layer_matrices * 4096 / rate)
    assert seconds["output head"] == pytest.approx(2 * 128256 * 4096 * 4096 * 500 / 700 / rate)
    assert seconds["layer transfers"] == seconds["pipeline transfers"] == seconds["experts"] == 0


def test_recompute_adds_a_forward_pass():
    plain = trainer().row(ROW, 32, False, TRAINING)["matrix products"]
    full = trainer(activations_checkpoint_granularity="full").row(ROW, 32, False, TRAINING)["matrix products"]
    assert full == pytest.approx(plain * 4 / 3)


def test_one_pass_makes_four_forward_units_of_five():
    """Score, reference and training: F + F + 3 F, or F + F + 2 F. The head makes 1 + 3 products either way."""
    names = ("matrix products", "attention", "elementwise", "output head", "layer transfers")
    scoring, both, backward = (
        trainer(tensor_model_parallel_size=2, sequence_parallel=True).row(ROW, 32, True, step)
        for step in (SCORING, TRAINING, BACKWARD)
    )
    units = {name: (both[name] / scoring[name], backward[name] / scoring[name]) for name in names}
    assert units == {
        "matrix products": (pytest.approx(3), pytest.approx(2)),
        "attention": (pytest.approx(3.5), pytest.approx(2.5)),
        "elementwise": (pytest.approx(3), pytest.approx(2)),
        "output head": (pytest.approx(3), pytest.approx(3)),
        "layer transfers": (pytest.approx(10 / 4), pytest.approx(6 / 4)),
    }
    kept = trainer().training(WORK, "bf16", one_pass=True)
    assert kept == pytest.approx({**trainer().over_rows(WORK, BACKWARD), **trainer().update("bf16")})


def test_rows_are_as_long_as_their_content():
    """64 / 8 groups of 199 + 4 * 501 tokens a replica, in rows of 4096 that shared prompts fill to 84%."""
    rows = trainer().rows(WORK)
    assert rows.count == -(-8 * 2203 // (4096 * SHARED_FILL)) == 6
    assert rows.tokens == 8 * 2203 / 6 + ROUNDING
    assert trainer(software=Software()).rows(WORK).tokens == 4096
    assert trainer(share_prompts=False).rows(WORK).tokens == 8 * 2800 / 6 + ROUNDING
    assert trainer(context_parallel_size=2).rows(WORK).scored_share == pytest.approx(500 / 700)


def test_pipeline_stages_pad_rows_to_the_longest():
    """To the full row on average: 16 groups of 2,203 in 11 rows, 3,204 tokens over 0.84."""
    rows = trainer(pipeline_model_parallel_size=2).rows(WORK)
    assert (rows.count, rows.tokens) == (11, 16 * 2203 / 11 / SHARED_FILL + ROUNDING)


def test_the_bubble_is_p_minus_1_rows_and_interleaving_divides_it():
    """Narayanan et al., section 2.2: (p - 1) / (v m) of the ideal time."""
    for chunks, share in ((None, 3.0), (2, 1.5)):
        one = trainer(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=chunks)
        parts = one.over_rows(WORK, TRAINING)
        rows = sum(value for name, value in parts.items() if name != "pipeline bubble")
        assert parts["pipeline bubble"] == pytest.approx(share * rows / one.rows(WORK).count)


def test_an_interleaved_schedule_takes_a_multiple_of_its_stages():
    layout = {"pipeline_model_parallel_size": 4, "share_prompts": False}
    plain, interleaved = trainer(**layout), trainer(virtual_pipeline_model_parallel_size=2, **layout)
    work = Workload(66, 4, 200, Generations(400, 1000), 100, 1500)
    assert plain.rows(WORK).count == 24  # 256 * 700 / 2 / (4096 * 0.94) = 23.3
    assert (plain.rows(work).count, interleaved.rows(work).count) == (24, 24)


def test_gradients_and_weights_cross_the_slowest_link_once():
    """6 bytes of 7/8 of the parameters; a second node makes the network the link."""
    one_node, two_nodes = (trainer(world).update("bf16")["gradient transfers"] for world in (8, 16))
    assert one_node == pytest.approx(6 * SHAPE.num_parameters * 7 / 8 / (LINK_EFFICIENCY * 450e9))
    assert two_nodes == pytest.approx(6 * SHAPE.num_parameters * 15 / 16 / (LINK_EFFICIENCY * 50e9))
    assert trainer(16, Software(overlaps_gradients=True)).update("bf16")["gradient transfers"] == 0


def test_fp8_is_refused_where_there_is_none():
    with pytest.raises(ConfigError, match="^model.fp8="):
        Trainer(SHAPE, ModelConfig(fp8="hybrid"), GPUS["a100"], 8, 8, OURS).training(WORK, "bf16")


def test_layers_in_bf16_slow_fp8_down_by_their_share():
    fast, mixed, slow = (
        trainer(**model).row(ROW, 32, False, SCORING)["matrix products"]
        for model in ({"fp8": "hybrid"}, {"fp8": "hybrid", "first_last_layers_bf16": True}, {})
    )
    assert mixed == pytest.approx(fast * 30 / 32 + slow * 2 / 32)


def sampler(**more):
    settings = {"num_servers": 4, "tensor_parallel_size": 1, "cached_tokens": 1e6, "most_sequences": 1024} | more
    return Sampler(SHAPE, H100, **settings)


def test_a_batch_is_what_waits_what_fits_and_what_is_sent():
    assert sampler().batch(WORK) == 64
    assert sampler(most_sequences=16).batch(WORK) == 16
    assert 1 < sampler(cached_tokens=4000).batch(WORK) < 16
    assert sampler(cached_tokens=1).batch(WORK) == 1


def test_equal_lengths_take_that_many_steps():
    work = Workload(64, 4, 200, Generations(1000, 1000), 100, 1500)
    assert sampler(step_seconds=0.01).seconds(work)["step overhead"] == pytest.approx(10.0)
    assert sampler(step_seconds=0.01, most_sequences=32).seconds(work)["step overhead"] == pytest.approx(20.0)


def test_decoding_one_sequence_reads_the_weights_every_step():
    """Everything but the embedding, 2 bytes each, at 0.8 of 3.35 TB/s, for 1,000 steps."""
    work = Workload(1, 1, 200, Generations(1000, 1000), 100, 1500)
    seconds = sampler(num_servers=1).seconds(work)["reading weights"]
    assert seconds == pytest.approx(1000 * 2 * (SHAPE.num_parameters - SHAPE.embedding) / (0.8 * 3.35e12))


def test_a_longer_limit_makes_a_longer_wait():
    short, long = (Workload(64, 4, 200, Generations(400, most), 100, 9000) for most in (1000, 8000))
    assert sum(sampler().seconds(long).values()) > 2 * sum(sampler().seconds(short).values())


def test_a_weight_sync_takes_as_long_as_taking_in_or_handing_on_whichever_is_longer():
    """Two stages of TP 2 on two nodes: half of a stage over NVLink, half of the model over the network."""
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    trainer = Trainer(SHAPE, ModelConfig(**layout), H100, 16, 8, OURS)
    size = 2 * SHAPE.num_parameters
    taken = size / 4 / (LINK_EFFICIENCY * 450e9) + size / 2 / (LINK_EFFICIENCY * 50e9) + 6 * size / 3.35e12
    assert trainer.weight_sync("bf16", 1e9)["moving weights"] == pytest.approx(size / 1e9)
    assert trainer.weight_sync("bf16", math.inf)["moving weights"] == pytest.approx(taken)
    assert trainer.weight_sync("fp32", math.inf)["moving weights"] == pytest.approx(2 * taken)
