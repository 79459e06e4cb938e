"""After a push a real vLLM server samples with the new weights."""

import pytest

from tests.support.pushes import pushed_twice_and_again
from tests.support.vllm_processes import needs_vllm

pytestmark = [needs_vllm, pytest.mark.timeout(900)]


def test_after_a_push_the_server_samples_with_the_new_weights(servers, tmp_path):
    """A Llama, whose output head is its embedding."""
    (server,) = servers.alike(1)
    pushed_twice_and_again(server.url, *servers.models, tmp_path)
