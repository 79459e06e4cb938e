"""The order of prompts: complete, reproducible, resumable at any position."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import DataConfig
from nemo_jepo.data.curriculum import order_of
from nemo_jepo.data.stream import Epochs, PromptStream
from nemo_jepo.types import Prompt

PROMPTS = tuple(Prompt(i, (i,), str(i), str(i)) for i in range(10))


def stream_of(prompts: Sequence[Prompt], per_step: int, shuffle: bool, seed: int) -> PromptStream:
    return PromptStream(prompts, per_step, Epochs(len(prompts), shuffle, seed))


def ids(batch: tuple[Prompt, ...]) -> list[int]:
    return [prompt.prompt_id for prompt in batch]


@given(num_prompts=st.integers(1, 10), per_step=st.integers(1, 25), seed=st.integers(0, 99))
def test_every_epoch_holds_every_prompt_once_whatever_the_batch_size(num_prompts, per_step, seed):
    stream = stream_of(PROMPTS[:num_prompts], per_step, shuffle=True, seed=seed)
    batches = [ids(stream.next_batch()) for _ in range(num_prompts)]  # per_step epochs
    assert all(len(batch) == per_step for batch in batches)
    order = [prompt_id for batch in batches for prompt_id in batch]
    for start in range(0, len(order), num_prompts):
        assert sorted(order[start : start + num_prompts]) == list(range(num_prompts))
    assert (stream.prompts_seen, stream.epoch) == (num_prompts * per_step, per_step)
    assert stream.batches_seen == num_prompts


def test_a_state_without_the_number_of_batches_has_as_many_as_its_prompts_make():
    stream = stream_of(PROMPTS, 4, shuffle=True, seed=3)
    stream.load_state_dict({"prompts_seen": 12, "num_prompts": 10, "seed": 3})
    assert stream.batches_seen == 3


@given(steps_before=st.integers(0, 12), per_step=st.integers(1, 13), resumed_per_step=st.integers(1, 13))
def test_a_resumed_stream_reads_what_an_uninterrupted_one_would(steps_before, per_step, resumed_per_step):
    stream = stream_of(PROMPTS, per_step, shuffle=True, seed=3)
    for _ in range(steps_before):
        stream.next_batch()
    resumed = stream_of(PROMPTS, resumed_per_step, shuffle=True, seed=3)
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert resumed.state_dict() == stream.state_dict()
    expected = [i for _ in range(resumed_per_step) for i in ids(stream.next_batch())]
    assert [i for _ in range(per_step) for i in ids(resumed.next_batch())] == expected


@given(handed_out=st.integers(0, 12), ahead=st.integers(0, 9), per_step=st.integers(1, 13))
def test_a_look_ahead_sees_the_later_batch_and_takes_nothing_out(handed_out, ahead, per_step):
    stream = stream_of(PROMPTS, per_step, shuffle=True, seed=3)
    for _ in range(handed_out):
        stream.next_batch()
    before = stream.state_dict()
    seen = stream.upcoming(ahead)
    assert stream.state_dict() == before
    for _ in range(ahead):
        stream.next_batch()
    assert stream.next_batch() == seen


def test_epochs_and_seeds_differ_in_order_and_equal_seeds_do_not():
    def first_epochs(seed: int) -> list[list[int]]:
        stream = stream_of(PROMPTS, 10, shuffle=True, seed=seed)
        return [ids(stream.next_batch()) for _ in range(2)]

    (first, second), (other, _) = first_epochs(3), first_epochs(4)
    assert first != second and first != other
    assert first_epochs(3) == [first, second]


@given(num_prompts=st.integers(1, 10), per_step=st.integers(1, 25))
def test_a_prompt_that_a_batch_holds_again_is_numbered(num_prompts, per_step):
    stream = stream_of(PROMPTS[:num_prompts], per_step, shuffle=True, seed=3)
    for _ in range(4):
        batch = stream.next_batch()
        for place, prompt in enumerate(batch):
            assert prompt.occurrence == ids(batch[:place]).count(prompt.prompt_id)
            assert replace(prompt, occurrence=0) == PROMPTS[prompt.prompt_id]


def test_without_shuffling_the_file_order_repeats():
    stream = stream_of(PROMPTS[:3], 4, shuffle=False, seed=3)
    assert [ids(stream.next_batch()) for _ in range(3)] == [[0, 1, 2, 0], [1, 2, 0, 1], [2, 0, 1, 2]]


def test_a_position_in_another_order_is_refused():
    saved = stream_of(PROMPTS, 4, shuffle=True, seed=3).state_dict()
    with pytest.raises(ValueError, match="num_prompts=10, resumed with 9"):
        stream_of(PROMPTS[:9], 4, shuffle=True, seed=3).load_state_dict(saved)
    with pytest.raises(ValueError, match="seed=3, resumed with 4"):
        stream_of(PROMPTS, 4, shuffle=True, seed=4).load_state_dict(saved)


@pytest.mark.parametrize("prompts, per_step", [((), 4), (PROMPTS, 0)])
def test_nothing_to_read_is_an_error(prompts, per_step):
    with pytest.raises(ValueError, match="must be at least 1"):
        stream_of(prompts, per_step, shuffle=True, seed=3)


# ---- prompts that are tied together ----------------------------------------------------------------------------------


def tied_stream(num_groups: int, size: int, per_step: int, shuffle: bool = True) -> PromptStream:
    prompts = [Prompt(i, (1,), "q", "a", group_key=f"g{i // size}") for i in range(num_groups * size)]
    config = DataConfig(group_key="group", shuffle=shuffle)
    return PromptStream(prompts, per_step, order_of(config, prompts, per_step))


def test_a_groups_prompts_stand_side_by_side_and_each_comes_once_an_epoch():
    stream = tied_stream(num_groups=5, size=2, per_step=4)
    seen = [prompt for _ in range(5) for prompt in stream.next_batch()]
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        assert first.group_key == second.group_key and second.prompt_id == first.prompt_id + 1
    assert Counter(prompt.prompt_id for prompt in seen) == dict.fromkeys(range(10), 2)
    assert stream.epoch == 2


def test_a_resumed_stream_of_groups_goes_on_where_it_was():
    whole = tied_stream(5, 2, 4)
    batches = [whole.next_batch() for _ in range(6)]
    for position in range(6):
        stream = tied_stream(5, 2, 4)
        for _ in range(position):
            stream.next_batch()
        resumed = tied_stream(5, 2, 4)
        resumed.load_state_dict(stream.state_dict())
        assert resumed.upcoming(1 if position < 5 else 0) == batches[min(position + 1, 5)]
        assert resumed.next_batch() == batches[position]


def test_groups_that_differ_in_size_or_do_not_fill_a_batch_are_refused():
    prompts = [Prompt(i, (1,), "q", "a", group_key=key) for i, key in enumerate("aabbb")]
    with pytest.raises(ConfigError, match="groups of 2 and 3 rows: all must have one size"):
        order_of(DataConfig(group_key="group"), prompts, 4)
    with pytest.raises(ConfigError, match="trainer.jepo.num_prompts_per_step=6: must be a multiple of 4"):
        order_of(DataConfig(group_key="group"), prompts[:2], 6, num_replicas=2)
    with pytest.raises(ConfigError, match="groups of 1 rows, and a pair of judgements has 2"):
        order_of(DataConfig(group_key="group", verifier="judgement"), prompts[:1], 4)
