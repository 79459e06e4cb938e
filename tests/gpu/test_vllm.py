"""Weights go from a trainer on a GPU to a vLLM server on one, and the server then has the trainer's log-probs.

Every run compares them after every push (`nemo_jepo.weight_sync.check_parity`) and ends where they differ.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_jepo.rollout.vllm.server import KEY_VARIABLE
from tests.gpu.marks import needs_two_gpus
from tests.support.command_line import ENVIRONMENT, metrics, run
from tests.support.serving import KEY, start_server, tiny_model, wait_for
from tests.support.vllm_processes import SHAPE, needs_vllm

pytestmark = [needs_vllm, pytest.mark.timeout(900)]

LENGTH = ["trainer.precision=bf16", "trainer.jepo.max_steps=3", "trainer.jepo.val_check_interval=0"]
LENGTH += ["trainer.jepo.save_interval=0", "rollout.max_tokens=40"]


def assert_trained_with_the_servers_samples(folder: Path) -> None:
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["train_optim/grad_norm"] > 0
        assert line["train_rollouts/logprob_difference"] < 0.1


@needs_two_gpus
def test_weights_are_pushed_over_nccl(tmp_path):
    """The server is the run's own, on the second GPU."""
    run("train", tmp_path, "rollout=vllm", "rollout.vllm.weight_transfer=nccl", *SHAPE, *LENGTH)
    assert_trained_with_the_servers_samples(tmp_path)


def test_a_run_and_its_server_take_turns_on_one_gpu(tmp_path):
    colocated = ["rollout=vllm_colocated", "rollout.vllm.engine_args.gpu_memory_utilization=0.3"]
    run("train", tmp_path, *colocated, "rollout.vllm.weight_transfer=file", *SHAPE, *LENGTH)
    assert_trained_with_the_servers_samples(tmp_path)


@pytest.fixture
def shared_gpu(tmp_path) -> Iterator[list[str]]:
    """Overrides for a run beside a server on the same GPU."""
    model = tmp_path / "model"
    tiny_model(model, "llama", tied=True, seed=1)
    options = ["--dtype", "bfloat16", "--", "--gpu-memory-utilization", "0.2"]
    server = start_server(model, *options, log=tmp_path / "server.log")
    try:
        wait_for([server])
        hf_config = ["hidden_size=64", "intermediate_size=96", "num_attention_heads=2", "num_key_value_heads=2"]
        yield [f"rollout.servers=[{server.url}]", f"tokenizer.path={model}"] + [
            f"model.hf_config.{entry}"
            for entry in (*hf_config, "num_hidden_layers=2", "vocab_size=320", "initializer_range=0.2")
        ]
    finally:
        server.end()


def test_weights_are_pushed_through_files_to_a_server_on_the_same_gpu(shared_gpu, tmp_path):
    transfer = ["rollout=vllm", "rollout.vllm.weight_transfer=file"]
    environment = ENVIRONMENT | {KEY_VARIABLE: KEY}
    run("train", tmp_path, *transfer, *shared_gpu, *LENGTH, environment=environment)
    assert_trained_with_the_servers_samples(tmp_path)
