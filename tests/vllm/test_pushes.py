"""After a push a real vLLM server samples with the new weights."""

import pytest

from nemo_jepo.config.schema import VLLMConfig
from nemo_jepo.rollout.vllm import shared_memory
from nemo_jepo.rollout.vllm.pool import Pool
from nemo_jepo.rollout.vllm.push import Pushed
from tests.support.pushes import assert_samples_with, pushed_twice_and_again, stream, transfer_of
from tests.support.serving import KEY, VOCAB, start_server, wait_for
from tests.support.vllm_processes import needs_vllm

pytestmark = [needs_vllm, pytest.mark.timeout(900)]


def test_after_a_push_the_server_samples_with_the_new_weights(servers, tmp_path):
    """A Llama, whose output head is its embedding."""
    (server,) = servers.alike(1)
    pushed_twice_and_again(server.url, *servers.models, tmp_path)


def test_weights_reach_a_server_through_shared_memory(servers, tmp_path, monkeypatch):
    """Of slots that a few tensors fill: a layer's come in several, and the memory of the first is used again."""
    monkeypatch.setattr(shared_memory, "SLOT_BYTES", 1 << 15)
    (old, new), options = servers.models, ["--weight-transfer", "shared_memory"]
    server = start_server(servers.model_folder, *options, log=tmp_path / "server.log")  # no other test may take it
    wait_for([server])
    pool = Pool([server.url], VLLMConfig(), KEY, VOCAB)
    with transfer_of(pool, new, tmp_path, weight_transfer="shared_memory") as transfer:
        for version, model in enumerate((new, old)):
            assert transfer.push([server.url], stream(model), version) == Pushed(updated=(server.url,))
            assert_samples_with(pool, model, version, [server.url])
    pool.close()
    server.end()
