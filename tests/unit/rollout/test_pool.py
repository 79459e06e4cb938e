"""Many servers as one: every sample exactly once, whatever the servers do."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest

from nemo_jepo.config.schema import VLLMConfig
from nemo_jepo.rollout.sampler import GenerationRequest, SamplersLost, SamplingStopped
from nemo_jepo.rollout.vllm import pool as pool_module
from nemo_jepo.rollout.vllm.pool import Pool
from nemo_jepo.types import Prompt, Rollout
from nemo_jepo.utils import http
from nemo_jepo.utils.http import ServerFault
from tests.support.fake_vllm import KEY, VOCAB, FakeVLLM, changed, good_answer, with_logprobs
from tests.unit.rollout.test_client import BROKEN

REQUEST = GenerationRequest(num_generations_per_prompt=4, max_tokens=5, stop_at_marker=False, temperature=0.5, seed=1)
PROMPTS = [Prompt(i, (1, i), "question", "answer") for i in range(6)]
DEADLINE_S = 60
"""No case here needs seconds; a loaded machine may."""


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch) -> None:
    monkeypatch.setattr(http, "FIRST_BACKOFF_S", 0.001)
    monkeypatch.setattr(pool_module, "HEALTH_INTERVAL_S", 0.05)


@contextmanager
def pool_of(num_servers: int, **settings: Any) -> Iterator[tuple[Pool, list[FakeVLLM]]]:
    """A pool whose servers are all admitted with the version that the fakes report."""
    with ExitStack() as stack:
        fakes = [stack.enter_context(FakeVLLM()) for _ in range(num_servers)]
        pool = Pool([fake.url for fake in fakes], VLLMConfig(**settings), KEY, VOCAB)
        stack.callback(pool.close)
        for fake in fakes:
            pool.admit(fake.url, 7)
        yield pool, fakes


def draw(pool: Pool, prompts: list[Prompt] = PROMPTS) -> list[Rollout]:
    return pool.submit(prompts, REQUEST, ()).result(DEADLINE_S)


def assert_each_sample_once(rollouts: list[Rollout], prompts: list[Prompt] = PROMPTS) -> None:
    assert [(r.group, r.sample) for r in rollouts] == [(g, s) for g in range(len(prompts)) for s in range(4)]


def assert_all_good(rollouts: list[Rollout]) -> None:
    assert_each_sample_once(rollouts)
    good = Rollout(0, 0, (3, 4), (-0.5, -0.25), "stop", policy_version=7, untempered=REQUEST.untempered)
    assert {replace(rollout, group=0, sample=0) for rollout in rollouts} == {good}


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_every_sample_comes_once_in_order():
    with pool_of(2) as (pool, fakes):
        assert_all_good(draw(pool))
        assert sum(len(fake.requests) for fake in fakes) == 24 == pool.num_done


def test_prompts_are_spread_over_servers_and_siblings_stay_together():
    with pool_of(3) as (pool, fakes):
        draw(pool)
        homes = [{tuple(body["token_ids"]) for body in fake.requests} for fake in fakes]
    assert [len(home) for home in homes] == [2, 2, 2]
    assert len(set.union(*homes)) == 6


def test_a_new_batch_goes_where_fewer_samples_wait():
    with pool_of(2) as (pool, (busy, idle)):
        busy.hangs = True
        pool.take_out(idle.url, "for the moment")
        first = pool.submit(PROMPTS[:1], REQUEST, ())
        wait_until(lambda: busy.running == 4)
        pool.admit(idle.url, 7)
        assert_each_sample_once(draw(pool, PROMPTS[1:2]), PROMPTS[1:2])
        assert len(idle.requests) == 4
        first.cancel()


def test_no_server_holds_more_requests_than_its_bound():
    with pool_of(2, max_concurrency=3) as (pool, fakes):
        for fake in fakes:
            fake.generate_s = 0.02
        assert_all_good(draw(pool))
    assert [fake.most_running for fake in fakes] == [3, 3]


@pytest.mark.parametrize("fault", BROKEN)
def test_a_server_that_answers_nonsense_is_taken_out_and_the_other_one_answers(fault):
    with pool_of(2) as (pool, (bad, good)):
        bad.answer = BROKEN[fault]
        for _ in range(pool_module.MAX_FAULTS_IN_A_ROW):  # requests that fail together count as one fault
            assert_all_good(draw(pool))
        assert list(pool.ready()) == [good.url]
        assert "faults in a row, the last: " in pool.out()[bad.url]
        assert pool.num_failed == 0 and pool.num_retried >= 4


def make_500(fake: FakeVLLM) -> None:
    fake.status = 500


def make_unhealthy(fake: FakeVLLM) -> None:
    fake.status, fake.health = 500, 503


def make_closing(fake: FakeVLLM) -> None:
    fake.closes = True


def make_stale(fake: FakeVLLM) -> None:
    fake.answer = lambda request: good_answer(request, version="6")


def make_restarted(fake: FakeVLLM) -> None:
    fake.answer = lambda request: good_answer(request, version="default")


def make_hanging(fake: FakeVLLM) -> None:
    fake.hangs = True


@pytest.mark.parametrize(
    "break_it", [make_500, make_unhealthy, make_closing, make_stale, make_restarted, make_hanging, FakeVLLM.die]
)
def test_a_broken_server_is_taken_out_and_the_other_one_answers(break_it):
    with pool_of(2, request_timeout_s=2.0) as (pool, (bad, good)):
        break_it(bad)
        for _ in range(pool_module.MAX_FAULTS_IN_A_ROW):
            assert_all_good(draw(pool))
        assert list(pool.ready()) == [good.url] and pool.num_failed == 0


def test_requests_leave_a_server_whose_engine_hangs_but_not_one_that_takes_weights(monkeypatch):
    """Its /health says that all is well."""
    monkeypatch.setattr(pool_module, "ENGINE_TIMEOUT_S", 0.1)
    with pool_of(2) as (pool, (bad, good)):
        bad.hangs = bad.engine_hangs = pool.takes_weights = True
        drawn = pool.submit(PROMPTS, REQUEST, ())
        wait_until(lambda: bad.running and good.requests)
        pool.take_out(good.url, "for the moment")
        assert list(pool.ready()) == [bad.url]
        pool.admit(good.url, 7)
        pool.takes_weights = False
        assert_all_good(drawn.result(DEADLINE_S))
        assert list(pool.ready()) == [good.url] and "/weight_info: no answer" in pool.out()[bad.url]


def test_one_bad_answer_in_between_costs_a_retry_and_no_server():
    answers = iter([with_logprobs(float("nan")), *[good_answer] * 999])
    with pool_of(2) as (pool, (bad, _)):
        bad.answer = lambda request: next(answers)(request)
        assert_all_good(draw(pool))
        assert (len(pool.ready()), pool.num_retried) == (2, 1)


def test_a_burst_of_faults_does_not_cost_the_only_server():
    """A load balancer that drops every connection once, say."""
    with pool_of(1) as (pool, (fake,)):
        numbers = itertools.count(1)

        def answer(body: dict[str, Any]) -> dict[str, Any]:
            fake.status = 500 if next(numbers) <= 24 else 200
            return good_answer(body)

        fake.hangs, fake.answer = True, answer
        future = pool.submit(PROMPTS, REQUEST, ())
        wait_until(lambda: fake.running == 24)
        fake.hangs = False
        assert_all_good(future.result(DEADLINE_S))
        assert pool.num_retried >= 24 and list(pool.ready()) == [fake.url]


def test_requests_in_flight_move_when_their_server_dies():
    with pool_of(2) as (pool, (dying, other)):
        dying.hangs = True
        future = pool.submit(PROMPTS, REQUEST, ())
        wait_until(lambda: dying.running == 12)
        dying.die()
        assert_all_good(future.result(DEADLINE_S))
        assert list(pool.ready()) == [other.url]


def test_a_server_that_says_it_is_ill_gives_up_requests_that_it_would_hold_for_ever():
    with pool_of(2) as (pool, (ill, _)):
        ill.hangs, ill.health = True, 503
        assert_all_good(draw(pool))
        assert "status 503" in pool.out()[ill.url]


def test_a_server_that_is_taken_out_gets_nothing_until_it_is_admitted():
    with pool_of(2) as (pool, (first, second)):
        pool.take_out(first.url, "resting")
        assert pool.out() == {first.url: "resting"}
        assert pool.answering([first.url, second.url]) == [first.url, second.url]
        assert_all_good(draw(pool))
        assert not first.requests
        pool.admit(first.url, 7)
        assert_all_good(draw(pool))
        assert first.requests and not pool.out()


def test_without_any_server_left_the_batch_says_why_of_each():
    with pool_of(2) as (pool, fakes):
        fakes[0].die()
        fakes[1].answer = changed(weight_versions=None)
        with pytest.raises(SamplersLost) as lost:
            draw(pool)
        assert all(fake.url in str(lost.value) for fake in fakes)
        assert "which no sync gave it" in str(lost.value)
        with pytest.raises(SamplersLost):
            draw(pool)


def test_a_request_that_every_server_would_refuse_fails_alone():
    """A prompt that is too long, say: status 400."""

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        fake.status = 400 if request["token_ids"] == [1, 2] else 200
        return good_answer(request)

    with pool_of(1, max_concurrency=1) as (pool, (fake,)):
        fake.answer = answer
        rollouts = draw(pool)
        assert_each_sample_once(rollouts)
        failed = [r for r in rollouts if r.finish_reason == "failed"]
        assert {r.group for r in failed} == {2} and len(failed) == 4 == pool.num_failed
        assert all(r.token_ids == () == r.generation_logprobs for r in failed)
        assert list(pool.ready()) == [fake.url] and len(fake.requests) == 24


def test_a_sample_that_keeps_failing_is_given_up_after_its_attempts(monkeypatch):
    monkeypatch.setattr(pool_module, "MAX_FAULTS_IN_A_ROW", 1000)
    with pool_of(2, max_attempts=3) as (pool, fakes):
        for fake in fakes:
            fake.status = 500
        rollouts = draw(pool, PROMPTS[:1])
        assert_each_sample_once(rollouts, PROMPTS[:1])
        assert {r.finish_reason for r in rollouts} == {"failed"}
        assert sum(len(fake.requests) for fake in fakes) == 4 * 3
        assert all(fake.requests for fake in fakes)  # the second attempt was at the other one


def test_a_pinned_request_asks_one_server_and_reports_its_fault():
    with pool_of(2) as (pool, (first, second)):
        assert len(pool.submit(PROMPTS, REQUEST, (), only=second.url).result(DEADLINE_S)) == 24
        assert not first.requests and len(second.requests) == 24
        second.status = 500
        with pytest.raises(ServerFault, match="status 500"):
            pool.submit(PROMPTS, REQUEST, (), only=second.url).result(DEADLINE_S)
        assert not first.requests


def test_a_control_route_answers_from_any_thread():
    with pool_of(1) as (pool, (fake,)):
        seen = []
        asking = threading.Thread(target=lambda: seen.append(pool.control(fake.url, "GET", "/weight_info")))
        asking.start()
        asking.join()
        assert seen == [{"weight_version": "7"}]
        with pytest.raises(ServerFault, match="status 404"):
            pool.control(fake.url, "POST", "/no_such_route")


def test_a_batch_that_is_told_to_stop_ends_its_requests_and_another_one_goes_on():
    """The other's requests wait for the places that the first one's give up."""
    told = threading.Event()
    with pool_of(2, max_concurrency=12) as (pool, fakes):
        for fake in fakes:
            fake.hangs = True
        stopped = pool.submit(PROMPTS, REQUEST, (), stop=told.is_set)
        other = pool.submit(PROMPTS, REQUEST, ())
        wait_until(lambda: sum(len(fake.requests) for fake in fakes) == 24)
        told.set()
        with pytest.raises(SamplingStopped, match="24 of 24 samples to come"):
            stopped.result(DEADLINE_S)
        wait_until(lambda: sum(len(fake.requests) for fake in fakes) == 48)
        for fake in fakes:
            fake.hangs = False
        assert_all_good(other.result(DEADLINE_S))
        assert len(pool.ready()) == 2


def test_closing_ends_open_requests_and_may_be_repeated():
    with pool_of(1) as (pool, (fake,)):
        fake.hangs = True
        future = pool.submit(PROMPTS, REQUEST, ())
        wait_until(lambda: fake.running == 24)
        pool.close()
        pool.close()
        assert future.cancelled()


def test_each_control_request_has_a_connection_of_its_own():
    """uvicorn closes one behind a 500; the next request on it would be lost."""
    with pool_of(1) as (pool, (fake,)):
        for _ in range(3):
            pool.control(fake.url, "GET", "/weight_info")
    assert len(set(fake.control_ports)) == 3
