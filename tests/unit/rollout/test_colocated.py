"""Servers on the trainers' GPUs, and trainers that give way: who is asked what in which order, over fake servers.

vLLM sleeps on GPUs alone. The fakes refuse what a server could not do in its sleep, as vLLM 0.32's sources have it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest
import torch

from nemo_jepo.config.errors import ConfigError, RunError
from nemo_jepo.config.schema import RolloutConfig, VLLMConfig
from nemo_jepo.rollout.build import vllm_settings
from nemo_jepo.rollout.queue import RolloutQueue
from nemo_jepo.rollout.sampler import GenerationRequest, SamplersLost, SamplingStopped
from nemo_jepo.rollout.shared_gpus import SharedGPUs
from nemo_jepo.rollout.vllm.colocated import ColocatedSampler, SleepingServers, Stage, put_to_sleep
from nemo_jepo.rollout.vllm.pool import Pool
from nemo_jepo.rollout.vllm.push import WeightTransfer
from nemo_jepo.types import Prompt
from tests.support.fake_vllm import KEY, VOCAB, FakeVLLM, good_answer
from tests.support.one_rank import OneRank

REQUEST = GenerationRequest(1, max_tokens=5, stop_at_marker=False, temperature=1.0, seed=1)
PROMPTS = [Prompt(i, (1, i), "question", "answer") for i in range(2)]
WAKE = ["trainer gives way", "wake_up?tags=weights"]
PUSH = ["pause?mode=keep", "collective_rpc", "reset_prefix_cache?reset_running_requests=true", "resume"]
SAMPLE = ["wake_up?tags=kv_cache", "generate", "generate"]
SLEEP = ["sleep?level=2&mode=abort", "trainer has its memory"]
TURN = [*WAKE, *PUSH, *SAMPLE, *SLEEP]


@dataclass
class FakeActor:
    """Says in the servers' log when it gives its memory up and when it has it; a wrong order is an error."""

    log: list[str]
    released: bool = False

    def release_memory(self) -> None:
        assert not self.released
        self.released = True
        self.log.append("trainer gives way")

    def take_back_memory(self) -> None:
        assert self.released
        self.released = False
        self.log.append("trainer has its memory")


@dataclass
class FakeServers:
    """In place of LocalServers: those in `dead` have ended until somebody starts them again."""

    urls: list[str]
    dead: dict[str, FakeVLLM] = field(default_factory=dict)
    restarted: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)

    def ended(self) -> dict[str, str]:
        return dict.fromkeys(self.dead, "ended with exit code 1")

    def restart_dead(self) -> list[str]:
        again = list(self.dead)
        for fake in self.dead.values():
            fake.health, fake.asleep, fake.version = 200, set(), "default"
        self.dead.clear()
        self.restarted += again
        return again

    def stop(self, urls: list[str]) -> None:
        self.stopped += urls

    def kill(self, fake: FakeVLLM) -> None:
        fake.health = 503
        self.dead[fake.url] = fake


@dataclass
class Run:
    """One replica's queue over sleeping servers, all of which it feeds; `log` is everybody's."""

    fakes: list[FakeVLLM]
    servers: FakeServers
    actor: FakeActor
    sampler: ColocatedSampler
    queue: RolloutQueue
    log: list[str]

    def sync(self, version: int) -> None:
        self.queue.load_weights(lambda: iter([("weight", torch.zeros(1))]), version)

    def turn(self, step: int) -> list[str]:
        """A sync and a batch; what happened."""
        self.log.clear()
        self.sync(step)
        assert len(self.queue.take(PROMPTS, step)) == 2
        return list(self.log)


@pytest.fixture
def run_of(tmp_path) -> Iterator[Callable[..., Run]]:
    """Number of servers, which sleep already, and of those among them that another replica feeds -> a run."""
    with ExitStack() as stack:

        def make(num_servers: int, num_others: int = 0) -> Run:
            log: list[str] = []
            fakes = [stack.enter_context(FakeVLLM()) for _ in range(num_servers)]
            for fake in fakes:
                fake.log, fake.asleep, fake.version = log, {"weights", "kv_cache"}, "none"
                fake.answer = lambda body, fake=fake: good_answer(body, fake.version)
            urls, settings = [fake.url for fake in fakes], VLLMConfig(weight_transfer="file", start_timeout_s=5.0)
            own = urls[: num_servers - num_others]
            pool = Pool(urls, settings, KEY, VOCAB)
            transfer = WeightTransfer(pool.control, settings, [("weight", (1,))], torch.float32, tmp_path / "weights")
            servers, actor = FakeServers(urls), FakeActor(log)
            sampler = ColocatedSampler(pool, transfer, own, "Answer:", 5.0, servers, sleep_level=2)
            stack.callback(sampler.close)
            shared, layout = SharedGPUs(actor, OneRank(), sampler), OneRank()
            queue = RolloutQueue(sampler, layout, lambda number: REQUEST, lambda ahead: PROMPTS, 0, None, shared)
            return Run(fakes, servers, actor, sampler, queue, log)

        yield make


def assert_trainers_turn(run: Run) -> None:
    """Every server that lives sleeps, and the trainer has its memory."""
    assert not run.actor.released and run.queue.version == -1
    for fake in run.fakes:
        assert fake.url in run.servers.dead or (fake.asleep == {"weights", "kv_cache"} and fake.version == "none")


def test_two_steps_and_a_validation_between_them_are_turns_of_servers_and_trainers(run_of):
    run = run_of(1)
    assert run.turn(0) == TURN
    assert_trainers_turn(run)
    for greedy in (False, True):  # the second batch of a validation needs weights again, though they are the same
        run.log.clear()
        run.sync(1)
        assert run.queue.version == 1
        ((first, second),) = run.queue.sample(PROMPTS, REQUEST)
        assert (first.policy_version, second.policy_version) == (1, 1), greedy
        assert run.log == TURN
    assert run.turn(1) == TURN
    assert_trainers_turn(run)


def test_the_probe_of_a_weight_sync_finds_the_servers_awake(run_of):
    run = run_of(1)
    run.sync(0)
    assert list(run.queue.probe(PROMPTS, REQUEST)) == [run.fakes[0].url]
    assert run.actor.released and not run.fakes[0].asleep


def test_all_servers_wake_before_any_samples_and_sleep_before_the_trainer_has_its_memory(run_of):
    run = run_of(3)
    happened = run.turn(0)
    assert happened[0] == WAKE[0] and happened[-1] == SLEEP[-1]
    assert set(happened[1:4]) == {WAKE[1]} and set(happened[-4:-1]) == {SLEEP[0]}
    assert happened.index("generate") > max(i for i, event in enumerate(happened) if event == SAMPLE[0])
    assert_trainers_turn(run)


def test_a_server_that_does_not_wake_is_out_for_this_turn_alone(run_of):
    for fails in ("/wake_up?tags=weights", "/wake_up?tags=kv_cache"):
        run = run_of(2)
        bad, good = run.fakes
        bad.refused = {fails}
        run.turn(0)
        assert not bad.requests and len(good.requests) == 2
        assert_trainers_turn(run)
        bad.refused = set()
        run.turn(1)
        assert bad.requests


def test_a_server_whose_cache_does_not_wake_is_not_taken_for_one_with_weights(run_of):
    """By another replica, which asks it for the version of its weights."""
    run = run_of(2)
    bad = run.fakes[0]
    bad.refused = {"/wake_up?tags=kv_cache"}
    run.sync(0)
    assert bad.version == "none" and run.fakes[1].version == "0"


def test_a_server_of_another_replica_is_asked_again_each_turn_whether_it_has_the_weights(run_of):
    """It had those of step 0 in the turn before; in this one its replica could not wake it."""
    run = run_of(2, num_others=1)
    other = run.fakes[1]
    other.asleep, other.version = set(), "0"
    run.turn(0)
    assert other.requests
    other.asleep, other.version = {"weights", "kv_cache"}, "none"
    asked = len(other.requests)
    run.turn(0)
    assert len(other.requests) == asked


def test_a_server_that_did_not_wake_is_given_no_weights_when_the_same_push_is_made_again(run_of):
    """Its memory may not be there: vLLM would crash."""
    run = run_of(2)
    run.fakes[0].refused = {"/wake_up?tags=weights"}
    run.sync(0)
    run.log.clear()
    run.sampler.load_weights(iter([("weight", torch.zeros(1))]), 0)
    assert run.log == PUSH


def test_a_server_that_died_asleep_is_started_again_and_waited_for_while_the_gpus_are_the_servers(run_of):
    run = run_of(2)
    run.turn(0)
    dead = run.fakes[0]
    run.servers.kill(dead)
    assert run.turn(1).count("wake_up?tags=weights") == 2
    assert run.servers.restarted == [dead.url] and not run.servers.stopped
    assert dead.requests
    assert_trainers_turn(run)


def test_a_server_that_does_not_come_back_in_time_is_stopped(run_of):
    """It would take memory of the GPU when it is the trainer's."""
    run = run_of(2)
    late = run.fakes[0]
    run.servers.kill(late)
    run.servers.restart_dead = lambda: [run.servers.dead.popitem()[0]]
    run.sampler._start_timeout_s = 0.1
    run.turn(0)
    assert run.servers.stopped == [late.url] and len(run.fakes[1].requests) == 2


def test_where_no_server_is_left_the_trainer_has_its_memory_to_save(run_of):
    run = run_of(1)
    run.sync(0)
    run.fakes[0].status = 500
    run.fakes[0].health = 503
    with pytest.raises(SamplersLost):
        run.queue.take(PROMPTS, 0)
    assert not run.actor.released and run.queue.version == -1


def test_a_run_that_is_told_to_stop_has_its_memory_to_save(run_of):
    run = run_of(1)
    run.sync(0)
    with pytest.raises(SamplingStopped):
        list(run.queue.sample(PROMPTS, REQUEST, stop=lambda: True))
    assert_trainers_turn(run)
    run.sync(0)
    run.fakes[0].hangs = True
    asked = iter([False])
    with pytest.raises(SamplingStopped):
        list(run.queue.sample(PROMPTS, REQUEST, stop=lambda: next(asked, True)))
    run.fakes[0].hangs = False
    assert_trainers_turn(run)


def test_a_server_that_lives_and_does_not_sleep_ends_the_run(run_of):
    run = run_of(2)
    run.sync(0)
    run.fakes[0].refused = {"/sleep?level=2&mode=abort"}
    with pytest.raises(RunError, match=f"does not sleep.*{run.fakes[0].url}/sleep"):
        run.queue.take(PROMPTS, 0)
    assert run.actor.released


def test_a_rank_without_a_sampler_gives_way_and_comes_back_with_the_others():
    actor = FakeActor([])
    drawn = ([], "", False, {})
    other = OneRank(is_replica_head=False, share_in_replica=lambda value: drawn)
    queue = RolloutQueue(
        None, other, lambda number: REQUEST, lambda ahead: PROMPTS, 0, None, SharedGPUs(actor, other, None)
    )
    queue.load_weights(lambda: iter([]), 3)
    assert actor.released and queue.version == 3
    queue.take(PROMPTS, 3)
    assert actor.log == [WAKE[0], SLEEP[1]] and queue.version == -1


def test_a_wrong_order_is_an_error_and_asks_the_server_nothing():
    asked = []

    def control(url: str, *request: object, **rest: object) -> dict[str, str]:
        asked.append(url)
        return {"status": "awake"}

    servers = SleepingServers(control, ["a"], 2, Stage.AWAKE)
    for wrong, stage in ((servers.wake_weights, "awake"), (servers.wake_cache, "awake")):
        with pytest.raises(RuntimeError, match=f"a is {stage}, and should be"):
            wrong(["a"])
    assert servers.sleep(["a"]) == {} == servers.sleep(["a"])
    with pytest.raises(RuntimeError, match="a is asleep, and should be awake without a cache"):
        servers.wake_cache(["a"])
    asked.clear()
    servers.wake_weights(["a"])
    with pytest.raises(RuntimeError, match="a is awake without a cache, and should be asleep"):
        servers.wake_weights(["a"])
    servers.wake_cache(["a"])
    assert servers.stages == {"a": Stage.AWAKE} and asked == ["a", "a"]


def test_servers_sleep_before_the_model_is_built_and_one_that_does_not_start_is_named():
    with FakeVLLM() as first, FakeVLLM() as second:
        servers, settings = FakeServers([first.url, second.url]), VLLMConfig(start_timeout_s=5.0, sleep_level=1)
        put_to_sleep(servers, settings, KEY, VOCAB)
        assert first.log == second.log == ["sleep?level=1&mode=abort"]
        assert first.asleep == second.asleep == {"weights", "kv_cache"} and first.version == "none"
        servers.kill(second)
        with pytest.raises(ConfigError, match=f"{second.url}: ended with exit code 1.*Look into"):
            put_to_sleep(servers, settings, KEY, VOCAB)


def test_servers_on_the_trainers_gpus_sleep_and_get_their_weights_through_memory_that_both_map():
    rollout = RolloutConfig(name="vllm_colocated")
    settings = vllm_settings(rollout)
    assert settings.weight_transfer == "shared_memory" and settings.engine_args["enable_sleep_mode"] is True
    rollout.vllm.weight_transfer = "file"
    assert vllm_settings(rollout).weight_transfer == "file"
    beside = RolloutConfig(name="vllm")
    assert vllm_settings(beside) is beside.vllm
