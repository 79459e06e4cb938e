"""The sampler over vLLM servers: who is sampled from after a sync, what is asked, and that a batch can be stopped."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch

from nemo_jepo.config.schema import VLLMConfig
from nemo_jepo.rollout.sampler import GenerationRequest, SamplersLost, SamplingStopped
from nemo_jepo.rollout.vllm import pool as pool_module
from nemo_jepo.rollout.vllm.pool import Pool
from nemo_jepo.rollout.vllm.push import Pushed, WeightTransfer
from nemo_jepo.rollout.vllm.sampler import VLLMSampler
from nemo_jepo.types import Prompt
from tests.support.fake_vllm import KEY, VOCAB, FakeVLLM

SYNCED = 7
"""The version of the weights that the fakes report."""
PROMPTS = [Prompt(i, (1, i), "question", "answer") for i in range(6)]
DEADLINE_S = 60


def request(stop_at_marker: bool = False) -> GenerationRequest:
    return GenerationRequest(2, max_tokens=5, stop_at_marker=stop_at_marker, temperature=1.0, seed=1)


class Transfer(WeightTransfer):
    """Reads the stream; the servers in `faults` do not take it, and those of their group only the next time."""

    faults: dict[str, str] = {}
    stuck: frozenset[str] = frozenset()
    pushes: list[tuple[str, ...]]

    def push(self, urls, named_tensors, version):
        assert [name for name, _ in named_tensors] == ["weight"]
        self.pushes.append(tuple(urls))
        lost = {url: self.faults[url] for url in urls if url in self.faults}
        well = tuple(url for url in urls if url not in lost)
        return Pushed(waiting=well, lost=lost, stuck=self.stuck) if lost else Pushed(updated=well)


@pytest.fixture
def sampler_of(tmp_path) -> Iterator[Callable[[int, int], tuple[VLLMSampler, Transfer, list[FakeVLLM]]]]:
    """(servers, own ones) -> a sampler that feeds the first of them; the others are another replica's."""
    with ExitStack() as stack:

        def make(num_servers: int, num_own: int) -> tuple[VLLMSampler, Transfer, list[FakeVLLM]]:
            fakes = [stack.enter_context(FakeVLLM()) for _ in range(num_servers)]
            urls, settings = [fake.url for fake in fakes], VLLMConfig(weight_transfer="gloo")
            pool = Pool(urls, settings, KEY, VOCAB)
            transfer = Transfer(pool.control, settings, [("weight", (1,))], torch.float32, tmp_path)
            transfer.pushes = []
            sampler = VLLMSampler(pool, transfer, urls[:num_own], "Answer:", 5.0, None)
            stack.callback(sampler.close)
            return sampler, transfer, fakes

        yield make


def sync(sampler: VLLMSampler, version: int = SYNCED) -> None:
    while sampler.load_weights([("weight", torch.zeros(1))], version):
        pass


def test_without_weights_there_is_nothing_to_sample_from(sampler_of):
    sampler, _, _ = sampler_of(1, 1)
    with pytest.raises(RuntimeError, match="load_weights"):
        sampler.submit(PROMPTS, request())


def test_servers_that_another_replica_fed_are_sampled_from_as_well(sampler_of):
    sampler, _, fakes = sampler_of(2, 1)
    sync(sampler)
    rollouts = sampler.submit(PROMPTS, request()).result(DEADLINE_S)
    assert [(r.group, r.sample) for r in rollouts] == [(group, sample) for group in range(6) for sample in range(2)]
    assert all(fake.requests for fake in fakes)
    assert sampler.counts() == {"retried_attempts": 0, "failed_samples": 0, "servers": 2}


def test_a_server_of_another_replica_with_other_weights_is_not_sampled_from(sampler_of):
    """The fakes report step 7; this sampler is at step 8, which its own server is given."""
    sampler, _, (own, other) = sampler_of(2, 1)
    sync(sampler, version=8)
    with pytest.raises(SamplersLost, match="sampled with weights of step 7 although it was given those of step 8"):
        sampler.submit(PROMPTS, request()).result(DEADLINE_S)
    assert own.requests and not other.requests


def test_a_server_that_did_not_take_the_weights_is_out_and_the_other_gets_them_once_more(sampler_of):
    sampler, transfer, (first, second) = sampler_of(2, 2)
    transfer.faults = {first.url: "no weight sync in time"}
    sync(sampler)
    sampler.submit(PROMPTS, request()).result(DEADLINE_S)
    assert not first.requests and len(second.requests) == 12
    transfer.faults = {}
    sync(sampler)  # the first one answers again
    both = (first.url, second.url)
    assert transfer.pushes == [both, (second.url,), both]


def test_a_server_that_waits_for_the_weights_is_not_sampled_from(sampler_of):
    sampler, transfer, (first, second) = sampler_of(2, 2)
    transfer.faults = {first.url: "no weight sync in time"}
    assert sampler.load_weights([("weight", torch.zeros(1))], SYNCED)
    with pytest.raises(SamplersLost, match="waits for weights that another server's loss has held up"):
        sampler.submit(PROMPTS, request()).result(DEADLINE_S)


def test_servers_that_waited_for_older_weights_are_given_the_new_ones_with_all_others(sampler_of):
    sampler, transfer, (first, second) = sampler_of(2, 2)
    transfer.faults = {first.url: "no weight sync in time"}
    assert sampler.load_weights([("weight", torch.zeros(1))], SYNCED)
    transfer.faults = {}
    assert not sampler.load_weights([("weight", torch.zeros(1))], SYNCED + 1)
    assert transfer.pushes == [(first.url, second.url)] * 2


RESTART = "nemo_jepo/restart"


def test_a_server_that_spoils_two_syncs_in_a_row_although_it_answers_is_to_be_started_again(sampler_of):
    sampler, transfer, fakes = sampler_of(2, 2)
    transfer.faults = {fakes[0].url: "refused"}
    sync(sampler)
    assert RESTART not in fakes[0].log
    transfer.faults = {}
    sync(sampler)  # it took weights: what was before does not count
    transfer.faults = {fakes[0].url: "refused"}
    sync(sampler)
    assert RESTART not in fakes[0].log
    sync(sampler)
    assert fakes[0].log.count(RESTART) == 1 and RESTART not in fakes[1].log
    sync(sampler)  # a new one: it is not asked at once again
    assert fakes[0].log.count(RESTART) == 1


def test_a_server_that_does_not_let_go_of_a_push_is_to_be_started_again_at_once(sampler_of):
    sampler, transfer, fakes = sampler_of(2, 2)
    transfer.faults, transfer.stuck = {fakes[0].url: "late"}, frozenset({fakes[0].url})
    sync(sampler)
    assert fakes[0].log.count(RESTART) == 1


@pytest.mark.parametrize("hangs", [False, True])
def test_the_last_server_is_to_be_started_again_at_once(sampler_of, monkeypatch, hangs):
    """The run ends, and the next one would count from 0."""
    monkeypatch.setattr(pool_module, "ENGINE_TIMEOUT_S", 0.2)
    sampler, transfer, fakes = sampler_of(1, 1)
    fakes[0].engine_hangs = hangs
    transfer.faults = {fakes[0].url: "refused"}
    sync(sampler)
    assert fakes[0].log.count(RESTART) == 1


def test_a_server_that_answers_nothing_is_left_to_its_supervisor(sampler_of):
    sampler, transfer, fakes = sampler_of(2, 2)
    fakes[0].health = 503
    for _ in range(3):
        sync(sampler)
    assert RESTART not in fakes[0].log and transfer.pushes == [(fakes[1].url,)] * 3


def test_a_server_whose_engine_hangs_spoils_no_push_and_is_to_be_started_again(sampler_of, monkeypatch):
    """Its /health says that all is well."""
    monkeypatch.setattr(pool_module, "ENGINE_TIMEOUT_S", 0.2)
    sampler, transfer, fakes = sampler_of(2, 2)
    fakes[0].engine_hangs = True
    sync(sampler)
    assert RESTART not in fakes[0].log
    sync(sampler)
    assert fakes[0].log.count(RESTART) == 1
    fakes[0].engine_hangs = False
    sync(sampler)
    assert transfer.pushes == [(fakes[1].url,), (fakes[1].url,), (fakes[0].url, fakes[1].url)]


def test_the_markers_spellings_end_a_completion_only_where_it_is_asked_to(sampler_of):
    sampler, _, (fake,) = sampler_of(1, 1)
    sync(sampler)
    for stop_at_marker in (True, False):
        sampler.submit(PROMPTS[:1], request(stop_at_marker)).result(DEADLINE_S)
    stops = [body["sampling_params"].get("stop") for body in fake.requests]
    assert stops == [["Answer:", "answer:", "ANSWER:"]] * 2 + [None] * 2


def test_a_probe_asks_each_own_server_and_one_that_fails_is_out(sampler_of):
    sampler, _, (good, bad, other) = sampler_of(3, 2)
    sync(sampler)
    bad.status = 500
    probes = sampler.probe(PROMPTS, request())
    assert list(probes) == [good.url] and len(probes[good.url]) == 12
    assert not other.requests and sampler.counts()["servers"] == 2


def test_a_batch_that_is_told_to_stop_ends_within_a_moment_and_the_next_one_is_drawn(sampler_of):
    sampler, _, (fake,) = sampler_of(1, 1)
    sync(sampler)
    fake.hangs = True
    deadline = time.monotonic() + 1.0
    with pytest.raises(SamplingStopped, match="12 of 12 samples to come"):
        sampler.submit(PROMPTS, request(), stop=lambda: time.monotonic() > deadline).result(DEADLINE_S)
    fake.hangs = False
    assert len(sampler.submit(PROMPTS, request()).result(DEADLINE_S)) == 12
