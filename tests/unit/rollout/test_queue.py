"""Rollouts by step: what is asked for ahead, and how the end of a sampler or of a run reaches every rank."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future

import pytest

from nemo_jepo.rollout.queue import RolloutQueue
from nemo_jepo.rollout.sampler import GenerationRequest, SamplersLost, SamplingStopped, never
from nemo_jepo.types import Prompt, Rollout
from tests.support.one_rank import OneRank


def request(seed: int) -> GenerationRequest:
    return GenerationRequest(
        num_generations_per_prompt=1, max_tokens=4, stop_at_marker=False, temperature=1.0, seed=seed
    )


def batch(step: int) -> list[Prompt]:
    return [Prompt(10 * step + i, (1,), "q", "a") for i in range(2)]


class Recorder:
    """A sampler that answers at once and remembers what it was asked."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.asked: list[tuple[list[int], int]] = []
        self.fault = fault
        self.weights: list[str] = []
        self.losses = 0
        """Times that it wants the weights once more."""
        self.futures: list[Future[list[Rollout]]] = []

    def submit(
        self, prompts: Sequence[Prompt], request: GenerationRequest, stop: Callable[[], bool] = never
    ) -> "Future[list[Rollout]]":
        self.asked.append(([prompt.prompt_id for prompt in prompts], request.seed))
        future: Future[list[Rollout]] = Future()
        if self.fault is not None:
            future.set_exception(self.fault)
        else:
            future.set_result([Rollout(i, 0, (7,), (-1.0,), "stop", request.seed) for i in range(len(prompts))])
        self.futures.append(future)
        return future

    def load_weights(self, weights, version: int) -> bool:
        self.weights += [name for name, _ in weights]
        self.losses -= 1
        return self.losses >= 0

    def counts(self) -> dict[str, float]:
        return {"failed_samples": float(len(self.asked))}


def queue(sampler: Recorder | None, max_staleness: int = 0, num_batches: int | None = 9, layout: OneRank | None = None):
    """Of a run that is at step 0: what is so many steps ahead is the batch of that step."""
    return RolloutQueue(sampler, layout or OneRank(), request, batch, max_staleness, num_batches)


def test_each_step_gets_the_rollouts_of_its_own_prompts_and_seed():
    sampler = Recorder()
    rollouts = queue(sampler).take(batch(3), 3)
    assert sampler.asked == [([30, 31], 3)]
    assert [(r.group, r.policy_version) for r in rollouts] == [(0, 3), (1, 3)]


def test_with_staleness_the_next_steps_are_asked_for_once_and_none_beyond_the_last():
    sampler = Recorder()
    rollouts = queue(sampler, max_staleness=2, num_batches=3)
    rollouts.take(batch(0), 0)
    assert [seed for _, seed in sampler.asked] == [0, 1, 2]
    assert sampler.asked[2] == ([20, 21], 2)
    assert rollouts.take(batch(1), 1)[0].policy_version == 1
    assert len(sampler.asked) == 3


def test_a_batch_that_is_ahead_of_the_stream_asks_for_those_behind_it():
    """Number 4, two ahead of the stream's next one: the batch after it is three ahead."""
    sampler = Recorder()
    queue(sampler, max_staleness=1, num_batches=None).take(batch(2), 4, ahead=2)
    assert sampler.asked == [([20, 21], 4), ([30, 31], 5)]


def test_a_rank_without_a_sampler_is_told_what_the_first_rank_of_its_replica_drew():
    drawn = [Rollout(0, 0, (5,), (-1.0,), "stop")]
    other = OneRank(is_replica_head=False, share_in_replica=lambda value: (drawn, "", False, {"servers": 2.0}))
    rollouts = queue(None, layout=other)
    assert rollouts.take(batch(0), 0) == drawn
    assert rollouts.counts == {"servers": 2.0}


@pytest.mark.parametrize("fault", [SamplersLost("no server"), SamplingStopped("told to stop")])
def test_a_fault_of_the_sampler_is_raised_by_name(fault):
    with pytest.raises(type(fault)):
        list(queue(Recorder(fault)).sample(batch(0), request(0)))


def test_a_fault_on_another_replica_is_raised_here_too():
    """Its first rank said so in the vote; this one has its rollouts and must not go on."""
    with pytest.raises(SamplersLost, match="another replica"):
        queue(Recorder(), layout=OneRank(any_over_world=lambda flag: True)).take(batch(0), 0)


def test_nothing_is_sampled_where_the_run_was_told_to_stop_before():
    sampler = Recorder()
    with pytest.raises(SamplingStopped):
        list(queue(sampler).sample(batch(0), request(0), stop=lambda: True))
    assert sampler.asked == []


def test_batches_are_all_asked_for_at_once_and_come_in_order_with_the_numbers_of_their_prompts():
    """Five prompts in three batches: 1, 2 and 2."""
    sampler, prompts = Recorder(), [Prompt(i, (1,), "q", "a") for i in range(5)]
    batches = queue(sampler).sample(prompts, request(7), num_batches=3)
    first = next(batches)
    assert sampler.asked == [([0], 7), ([1, 2], 7), ([3, 4], 7)]
    assert [[rollout.group for rollout in drawn] for drawn in (first, *batches)] == [[0], [1, 2], [3, 4]]


def test_a_rank_with_fewer_prompts_than_batches_reads_as_many_of_them():
    assert list(queue(Recorder()).sample(batch(0)[:1], request(0), num_batches=3)).count([]) == 2


class Slow(Recorder):
    """Answers the first batch at once, and the others never."""

    def submit(
        self, prompts: Sequence[Prompt], request: GenerationRequest, stop: Callable[[], bool] = never
    ) -> "Future[list[Rollout]]":
        if not self.futures:
            return super().submit(prompts, request, stop)
        self.futures.append(Future())
        return self.futures[-1]


def test_what_is_still_to_come_is_given_up_where_the_run_is_told_to_stop_after_a_batch():
    sampler, told = Slow(), []
    batches = queue(sampler).sample(batch(0), request(0), stop=lambda: bool(told), num_batches=2)
    with pytest.raises(SamplingStopped):
        for _ in batches:
            told.append(True)
            sampler.futures[1].set_exception(SamplingStopped("the sampler was asked as well"))
    sampler = Slow()
    batches = queue(sampler).sample(batch(0), request(0), num_batches=2)
    next(batches)
    batches.close()
    assert sampler.futures[1].cancelled()


class Replicas(OneRank):
    """This rank's vote, and those of the other replicas: the next one of `others` each time."""

    def __init__(self, others: Sequence[bool]) -> None:
        super().__init__()
        votes = iter([*others, False])
        self.any_over_world = lambda flag: next(votes) | flag


@pytest.mark.parametrize(
    ("losses", "others", "given", "read"),
    [(0, [True], 1, 1), (1, [True, False], 2, 2), (0, [True, True, True], 1, 3), (None, [True, True], 0, 2)],
    ids=["once", "a server of ours was lost", "servers of others were lost", "a rank without a sampler"],
)
def test_every_rank_reads_the_weight_stream_to_its_end_as_often_as_any_sampler_wants_it(losses, others, given, read):
    sampler, streamed = Recorder() if losses is not None else None, []

    def stream():
        for name in ("a", "b"):
            streamed.append(name)
            yield name, None

    if sampler is not None:
        sampler.losses = losses
    one = queue(sampler, layout=Replicas(others))
    one.load_weights(stream, 4)
    assert one.version == 4
    assert streamed == ["a", "b"] * read and (sampler is None or sampler.weights == ["a", "b"] * given)
