"""The benchmarks run at toy size and say what they measured; how fast a machine is, no test knows."""

import math

import pytest
import torch

from benchmarks import logprob_memory, step
from benchmarks.h100 import __main__ as h100
from benchmarks.h100.workload import MODELS, TOY, model_flops
from benchmarks.peers import __main__ as peers
from benchmarks.peers import workload
from benchmarks.report import medians, paired_ratio
from nemo_jepo.actor.model import load_hf_config
from nemo_jepo.actor.weights.load import hf_shapes


def test_a_ratio_is_the_median_over_repetitions_of_neighbours():
    rounds = [{"a": {"s": a}, "b": {"s": b}} for a, b in ((1.0, 2.0), (30.0, 10.0), (4.0, 4.0))]
    assert medians(rounds) == {"a": {"s": 4.0}, "b": {"s": 4.0}}
    assert paired_ratio(rounds, "s", "a", "b") == 1.0  # of 0.5, 3, 1


@pytest.fixture(scope="module")
def memory_report() -> dict:
    """Medians of three: resident memory counts pages of libraries too, which the kernel may take and give back.

    A block has more than 32 MB, so that malloc returns it to the kernel when it is freed.
    """
    return logprob_memory.run(logprob_memory.Size(tokens=1024, hidden=64, vocab=36_864, chunk_tokens=256), 3)


def test_the_memory_benchmark_sees_every_block_of_logits(memory_report):
    logits, one_block, slack = 4 * 1024 * 36_864, 4 * 256 * 36_864, 6e6
    gradients, hidden_gradient = 4 * 64 * (1024 + 36_864), 4 * 64 * 1024
    naive, *in_blocks = memory_report["medians"].values()
    assert memory_report["gradient_bytes"] == gradients
    # Without gradients: logits and log_softmax. With: log_softmax, its gradient, and the gradient of the logits.
    assert naive["bytes_without_gradients"] == pytest.approx(2 * logits, abs=slack)
    assert naive["bytes_with_gradients"] == pytest.approx(3 * logits, abs=slack)
    for found in in_blocks:  # the weight's gradient goes to main_grad, which is there before
        assert found["bytes_without_gradients"] == pytest.approx(one_block, abs=slack)
        assert found["bytes_with_gradients"] == pytest.approx(one_block + hidden_gradient, abs=slack)


def test_the_memory_benchmark_compares_equal_results(memory_report):
    for found in memory_report["differences_from_fp64"].values():
        assert set(found) == {"logprobs", "hidden_gradient", "weight_gradient"}
        assert 0 < max(found.values()) < 1e-4


def test_the_memory_benchmark_shows_every_figure(memory_report):
    shown = logprob_memory.show(memory_report)
    assert "time with gradients" in shown and "peak without gradients" in shown
    assert list(memory_report["ratios"]) == ["chunked", "fused"]
    assert all(set(ratios) == set(memory_report["rounds"][0]["naive"]) for ratios in memory_report["ratios"].values())


def batch() -> tuple[list[step.Spliced], int]:
    return step.draw_sequences(step.Batch(prompts=3, generations=2), step.gsm8k_like_lengths()), 1024


def test_every_layout_scores_the_same_tokens():
    sequences, tokens_per_row = batch()
    expected = sorted(
        (index, token)
        for index, sequence in enumerate(sequences)
        for token in sequence.token_ids[sequence.prompt_length :]
    )
    for rows in step.layouts(sequences, tokens_per_row).values():
        found = [
            pair
            for row in rows
            for pair in zip(
                row.sequence_index[row.scored_mask].tolist(), row.token_ids[row.scored_mask].tolist(), strict=True
            )
        ]
        assert sorted(found) == expected


def test_a_padded_batch_gives_every_sequence_a_slot_of_the_longest():
    sequences, tokens_per_row = batch()
    longest = max(sequence.length for sequence in sequences)
    for row in step.layouts(sequences, tokens_per_row)["padded batch"]:
        assert len(row.token_ids) % longest == 0 and len(row.token_ids) <= tokens_per_row
        assert row.cu_seqlens[0] == 0 and row.cu_seqlens[-1] == len(row.token_ids)
        for start, end in zip(row.cu_seqlens[:-1].tolist(), row.cu_seqlens[1:].tolist(), strict=True):
            assert torch.equal(row.position_ids[start:end], torch.arange(end - start))
            assert len(row.sequence_index[start:end].unique()) == 1


# ---- One H100. Without one: what is counted, what is compared, and that the code runs.


def test_model_flops_count_every_matrix_product_once():
    """By hand: 2 layers, hidden 64, 4 query and 2 key-value heads of 16, MLP 128, vocabulary 2048."""
    shape = MODELS["8b_shape"] | TOY
    lengths = {"prompt_length": 3, "chain_length": 5, "answer_length": 2}
    one = step.Spliced(0, 0, tuple(range(10)), **lengths, valid=True, has_marker=True)
    layer = 64 * 64 + 64 * 32 + 64 * 32 + 64 * 64 + 3 * 64 * 128  # q, k, v, output; gate, up, down
    head = 7 * 64 * 2048  # at scored tokens
    pairs = 10 * 10 / 2 * 64  # of positions, causal; scores, and once more the weighted values
    forward = 2 * (2 * 10 * layer + head + 2 * 2 * pairs)
    assert model_flops(shape, [one]) == 3 * forward
    assert model_flops(shape, [one, one]) == 6 * forward


@pytest.mark.parametrize(("name", "parameters"), [("8b_shape", 8.03e9 - 28 * 218.1e6), ("1b", 1.236e9)])
def test_the_benchmark_models_have_the_shapes_that_they_are_named_after(name, parameters):
    """Llama 3.1 8B has 8.03e9 parameters, 218.1e6 in each of its 32 layers; Llama 3.2 1B has 1.236e9."""
    shapes = hf_shapes(load_hf_config(MODELS[name]))
    assert sum(math.prod(shape) for shape in shapes.values()) == pytest.approx(parameters, rel=1e-3)


def test_agreement_is_measured_against_the_spread_within_groups():
    exact = {"token_logprobs": [-1.0, -2.0], "answer_logprobs": [[-1.0, -3.0], [-5.0, -9.0]], "losses": [2.0, 1.0]}
    found = {"token_logprobs": [-1.1, -1.9], "answer_logprobs": [[-1.0, -3.0], [-5.0, -8.0]], "losses": [2.0, 1.01]}
    near = h100.agreement(found, exact)
    assert near["token_logprob_difference"] == pytest.approx(0.1)
    assert near["largest_loss_difference"] == pytest.approx(0.01)
    assert near["fp8_logprob_error"] == pytest.approx(0.5)  # one of four is off by 1
    assert near["fp8_group_spread"] == pytest.approx(math.sqrt((2.0 + 4.5) / 2))
    assert near["fp8_error_ratio"] == pytest.approx(0.5 / math.sqrt(3.25))


# ---- TRL and plain PyTorch beside nemo_jepo


def test_every_worker_reads_the_same_token_ids(tmp_path):
    size = peers.Size(sequences=16, chain_tokens=5)
    for part in peers.PARTS:
        work = peers.draw_workload(part, size, threads=1)
        work.write(tmp_path)
        assert workload.read(tmp_path) == work
        assert len(list(work.sequences)) == 16
        for prompt, completion in work.sequences:
            assert min(prompt + completion) >= workload.FIRST_TOKEN  # nothing that TRL's tokenizer calls padding or end
    first = next(iter(peers.draw_workload("update_5m", size, threads=1).groups))
    assert len(first.chains) == 8 and first.completions[3] == first.chains[3] + first.answer


def test_variants_that_do_other_work_are_refused():
    rounds = [{"TRL": {"cpu_seconds": 1.0}, "a": {"grad_norm": 2.0}, "b": {"grad_norm": 2.0001}}]
    peers.require_equal_gradients(rounds)
    rounds[0]["b"]["grad_norm"] = 2.001
    with pytest.raises(ValueError, match="gradient norms differ: a 2.0, b 2.001"):
        peers.require_equal_gradients(rounds)
