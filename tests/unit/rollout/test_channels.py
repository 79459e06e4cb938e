"""A group that is opened with several servers, of which one refuses."""

import threading
from typing import Any

import pytest
import torch

from nemo_jepo.rollout.vllm.channels import GlooChannel
from nemo_jepo.rollout.vllm.fleet import Fleet, ServersFailed

URLS = ("http://127.0.0.1:1", "http://127.0.0.1:2")


def test_a_server_that_refuses_to_join_is_named_at_once_and_the_others_are_not_blamed():
    """The other one waits for everybody, as a server does, and so does the trainer's end."""
    over = threading.Event()

    def control(url: str, method: str, route: str, *_: Any, **__: Any) -> dict[str, Any]:
        if route == "/get_world_size":
            return {"world_size": 1}
        if url == URLS[0]:
            raise RuntimeError("started for another way of weights")
        assert over.wait(60)
        raise RuntimeError("nobody came")

    with pytest.raises(ServersFailed) as caught:
        GlooChannel(Fleet(control, URLS), [("a", (2,))], torch.float32, 600.0)
    assert list(caught.value.reasons) == [URLS[0]] and not over.is_set()
    over.set()
