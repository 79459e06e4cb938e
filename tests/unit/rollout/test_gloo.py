"""Weights through a gloo group of two threads, in buckets."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nemo_jepo.rollout.vllm import gloo

SHAPES = [(2, 3), (4,), (5,), (3, 4), (2,), (1,), (8,)]
"""6, 4, 5, 12, 2, 1 and 8 elements."""


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    """Ten elements of fp32."""
    monkeypatch.setattr(gloo, "BUCKET_BYTES", 40)


def test_a_bucket_holds_neighbours_that_fit_and_a_larger_tensor_goes_alone():
    assert list(gloo.buckets(SHAPES, 4)) == [[6, 4], [5], [12], [2, 1], [8]]
    assert list(gloo.buckets(SHAPES, 2)) == [[6, 4, 5], [12, 2, 1], [8]]
    assert list(gloo.buckets([], 4)) == []


def test_what_arrives_is_what_was_sent_one_message_a_bucket():
    """A transposed tensor among them; the receiver keeps all of them, as vLLM keeps those of an unfinished layer."""
    sent = [torch.randn(*shape) for shape in SHAPES]
    sent[0] = torch.randn(3, 2).t()
    store = gloo.open_store("127.0.0.1", 2, 20.0)
    meeting = gloo.Meeting("127.0.0.1", store.port, 2, 20.0)

    def receive() -> tuple[list[int], list[torch.Tensor]]:
        group = gloo.TransferGroup(meeting, 1, gloo.join_store(meeting))
        noted, arrived = [], []
        for tensors in group.receive(SHAPES, torch.float32):
            noted.append(gloo.received(store, [1])[1])
            arrived += tensors
        return noted, arrived

    with ThreadPoolExecutor(1) as executor:
        receiving = executor.submit(receive)
        group = gloo.TransferGroup(meeting, 0, store)
        for bucket in gloo.packed(iter(sent), SHAPES, torch.float32):
            group.send(bucket, 20.0)
        noted, arrived = receiving.result()
    assert noted == [0, 2, 3, 4, 6]
    assert gloo.received(store, [1]) == {1: 7}
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(sent, arrived, strict=True))


def test_a_stream_that_is_too_short_sends_no_stale_bucket():
    with pytest.raises(RuntimeError):
        list(gloo.packed(iter([torch.zeros(2, 3)]), SHAPES, torch.float32))


def test_counts_of_an_earlier_update_are_forgotten():
    """Else a receiver that hangs before it begins seems to have everything."""
    store = gloo.open_store("127.0.0.1", 3, 20.0)
    store.set("received/1", "7")
    store.set("received/2", "7")
    gloo.begin_count(store, 3)
    assert gloo.received(store, [1, 2]) == {1: 0, 2: 0}
