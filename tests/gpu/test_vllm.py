"""Weights go from a trainer on a GPU to a vLLM server on one, and the server then has the trainer's log-probs.

Every run compares them after every push (`nemo_jepo.weight_sync.check_parity`) and ends where they differ.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from nemo_jepo.config.schema import VLLMConfig
from nemo_jepo.rollout.vllm.pool import Pool
from nemo_jepo.rollout.vllm.sampler import VLLMSampler
from nemo_jepo.rollout.vllm.server import KEY_VARIABLE
from tests.gpu.marks import needs_two_gpus
from tests.support.command_line import ENVIRONMENT, metrics, run
from tests.support.pushes import PROMPTS, differences, push_in_flight, request, stream, transfer_of
from tests.support.serving import KEY, VOCAB, Server, start_server, tiny_model, wait_for
from tests.support.vllm_processes import SHAPE, needs_vllm

pytestmark = [needs_vllm, pytest.mark.timeout(900)]

LENGTH = ["trainer.precision=bf16", "trainer.jepo.max_steps=3", "trainer.jepo.val_check_interval=0"]
LENGTH += ["trainer.jepo.save_interval=0", "rollout.max_tokens=40"]
OF_THE_MODEL = ["hidden_size=64", "intermediate_size=96", "num_attention_heads=2", "num_key_value_heads=2"]
OF_THE_MODEL += ["num_hidden_layers=2", "vocab_size=320", "initializer_range=0.2"]
ROUNDING, LARGEST = 0.1, 0.5
"""Nats: of bf16 log-probs on average, and of any token. Two random models are nats apart."""


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
    run("train", tmp_path, *colocated, *SHAPE, *LENGTH)
    assert_trained_with_the_servers_samples(tmp_path)


@dataclass(frozen=True)
class Served:
    """A server, its model's folder, that model and another one, in bf16."""

    server: Server
    folder: Path
    old: PreTrainedModel
    new: PreTrainedModel


def serve(folder: Path, *options: str) -> Served:
    """One that answers, to be ended by the caller."""
    old, new = (tiny_model(folder / str(seed), "llama", tied=True, seed=seed).bfloat16() for seed in (1, 2))
    server = start_server(folder / "1", "--dtype", "bfloat16", *options, log=folder / "server.log")
    wait_for([server])
    return Served(server, folder / "1", old, new)


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    """A server that leaves room for a trainer on the same GPU."""
    served = serve(tmp_path_factory.mktemp("served"), "--", "--gpu-memory-utilization", "0.2")
    yield served
    served.server.end()


def test_the_server_has_what_only_gpus_have(served):
    """vLLM's second model runner and CUDA graphs: the tests below are about these."""
    log = served.server.log.read_text()
    assert "Using V2 Model Runner" in log and "Graph capturing finished" in log


def test_weights_are_pushed_through_files_to_a_server_on_the_same_gpu(served, tmp_path):
    transfer = ["rollout=vllm", "rollout.vllm.weight_transfer=file", f"rollout.servers=[{served.server.url}]"]
    model = [f"tokenizer.path={served.folder}", *(f"model.hf_config.{entry}" for entry in OF_THE_MODEL)]
    environment = ENVIRONMENT | {KEY_VARIABLE: KEY}
    run("train", tmp_path, *transfer, *model, *LENGTH, environment=environment)
    assert_trained_with_the_servers_samples(tmp_path)


def test_pushed_weights_draw_the_tokens_and_their_log_probs_are_of_the_tempered_distribution(served, tmp_path):
    assert_pushed_weights_serve(served, tmp_path)


def assert_pushed_weights_serve(served: Served, folder: Path) -> None:
    """At rest, again with the prompts in the prefix cache, and for requests that a push finds half done."""
    url = served.server.url
    pool = Pool([url], VLLMConfig(), KEY, VOCAB)
    with transfer_of(pool, served.old, folder, weight_transfer="file") as transfer:
        sampler = VLLMSampler(pool, transfer, [url], "Answer:", 60, None)
        for version, model in ((2, served.old), (3, served.new), (4, served.old)):
            sampler.load_weights(stream(model), version)
            for temperature in (1.0, 0.5, 1.0):
                drawn = sampler.submit(PROMPTS, replace(request(), temperature=temperature)).result()
                assert {rollout.policy_version for rollout in drawn} == {version}
                assert torch.cat([differences(model, one, temperature) for one in drawn]).mean() < ROUNDING
        push_in_flight(pool, transfer, url, served.old, served.new, LARGEST)
    pool.close()
