"""Orders that follow what was learnt: who is left out, who comes how often, and what a position names."""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_jepo.config.schema import DataConfig
from nemo_jepo.data.curriculum import HarderEpochs, LearningProgress, clusters_of, order_of
from nemo_jepo.data.stream import Epochs, Order, PromptStream, Shown
from nemo_jepo.types import Prompt

PROMPTS = tuple(Prompt(100 + i, (i,), str(i), str(i)) for i in range(10))  # ids are not places


def places(batch: Sequence[Prompt]) -> list[int]:
    return [prompt.prompt_id - 100 for prompt in batch]


def train(stream: PromptStream, shows: Callable[[int, int], Shown], num_batches: int = 1) -> list[int]:
    """One step as `fit` makes it: the places it has used, of which `shows` says what they show at such a batch."""
    number = stream.batches_seen
    used = [place for _ in range(num_batches) for place in places(stream.next_batch())]
    stream.learn([shows(place, number) for place in used])
    return used


def rates(*known: float) -> Callable[[int, int], Shown]:
    return lambda place, batch: Shown(known[place], math.nan)


# ---- leaving easy prompts out


@given(num_prompts=st.integers(1, 10), per_step=st.integers(1, 25), shuffle=st.booleans())
def test_where_nothing_is_easy_the_order_is_the_usual_one(num_prompts, per_step, shuffle):
    hard = PromptStream(PROMPTS[:num_prompts], per_step, HarderEpochs(num_prompts, shuffle, 3, 0.5, per_step))
    usual = PromptStream(PROMPTS[:num_prompts], per_step, Epochs(num_prompts, shuffle, 3))
    for _ in range(num_prompts + 2):
        assert train(hard, lambda place, batch: Shown(0.4, 0.0)) == places(usual.next_batch())
        assert hard.epoch == usual.epoch


def test_an_epoch_begins_without_what_became_easy_in_the_one_before():
    stream = PromptStream(PROMPTS[:6], 2, HarderEpochs(6, True, 3, 0.5, 2))
    shows = rates(1.0, 0.4, 0.5, 0.0, 0.49, math.nan)
    epochs = [sorted(train(stream, shows) + train(stream, shows) + train(stream, shows))]
    epochs += [sorted(train(stream, shows) + train(stream, shows)) for _ in range(2)]
    assert epochs == [[0, 1, 2, 3, 4, 5], [1, 3, 4, 5], [1, 3, 4, 5]]  # one without a rate is not easy
    assert (stream.epoch, stream.prompts_seen) == (3, 14)
    assert stream.metrics() == {"prompts_left": 4.0}


def test_the_last_pass_rate_counts_and_who_is_out_stays_out():
    stream = PromptStream(PROMPTS[:4], 2, HarderEpochs(4, False, 3, 0.5, 2))
    first = {0: 0.9, 1: 0.2, 2: 0.2, 3: 0.2}
    later = {1: 0.2, 2: 0.2, 3: 0.9}
    seen = [train(stream, lambda place, batch: Shown((first if batch < 2 else later)[place], 0.0)) for _ in range(6)]
    # 0 goes after the first epoch; the batch [3, 1] crosses into the third, which begins before it shows that 3 is easy
    assert seen == [[0, 1], [2, 3], [1, 2], [3, 1], [2, 3], [1, 2]]


def test_a_batch_of_the_hardest_always_stays():
    stream = PromptStream(PROMPTS[:6], 3, HarderEpochs(6, False, 3, 0.5, 3))
    shows = rates(0.9, 0.6, 1.0, 0.9, 0.7, 0.9)
    used = [train(stream, shows) for _ in range(4)]
    assert used[2:] == [[0, 1, 4], [0, 1, 4]]  # of the three at 0.9 the first


# ---- learning progress


def spreads(*known: float) -> list[Shown]:
    return [Shown(math.nan, spread) for spread in known]


def test_probabilities_are_the_formula():
    order = LearningProgress([0, 1, 2, 3], seed=3, floor=0.2, keep=0.75)
    assert order.probabilities() == [0.25] * 4  # nothing was seen
    order.learn([0, 1], spreads(2.0, 1.0))
    # 2 and 3 are unseen: as the largest. Weights 2 1 2 2.
    assert order.probabilities() == pytest.approx([0.05 + 0.8 * weight / 7 for weight in (2, 1, 2, 2)])
    order.learn([0, 2, 3, 3], spreads(4.0, 0.0, 1.0, 3.0))
    # 0: 3/4 2 + 1/4 4 = 2.5; 2: its first; 3: the mean of the step.
    assert order.probabilities() == pytest.approx([0.05 + 0.8 * weight / 5.5 for weight in (2.5, 1, 0, 2)])
    assert order.metrics()["sampler_effective_prompts"] == pytest.approx(1 / sum(p * p for p in order.probabilities()))
    order.learn([1], spreads(math.nan))  # no sample arrived
    assert order.probabilities()[1] == pytest.approx(0.05 + 0.8 / 5.5)


def test_where_no_samples_differ_the_draws_are_uniform():
    order = LearningProgress([0, 1], seed=3, floor=0.1, keep=0.0)
    order.learn([0, 1], spreads(0.0, 0.0))
    assert order.probabilities() == [0.5, 0.5]


def test_frequencies_are_the_probabilities():
    """Counts of 20,000 draws within five standard deviations of their means; the floor's prompt is drawn as well."""
    order = LearningProgress([0, 1, 2], seed=3, floor=0.1, keep=0.0)
    order.learn([0, 1, 2], spreads(3.0, 1.0, 0.0))
    counts = Counter(place for _ in range(2000) for place in order.take(10))
    for place, probability in enumerate(order.probabilities()):
        deviation = math.sqrt(20000 * probability * (1 - probability))
        assert abs(counts[place] - 20000 * probability) < 5 * deviation
    assert order.epoch == 6666


def test_prompts_of_a_cluster_are_measured_as_one():
    named = [Prompt(i, (i,), "q", "a", cluster=name) for i, name in enumerate(["b", "a", "b", "a", "c"])]
    assert clusters_of(named) == [0, 1, 0, 1, 2]
    assert clusters_of(PROMPTS[:3]) == [0, 1, 2]
    order = LearningProgress(clusters_of(named), seed=3, floor=0.5, keep=0.5)
    order.learn([0, 2, 1, 4], spreads(1.0, 3.0, 4.0, 0.0))
    assert order.probabilities() == pytest.approx([0.1 + 0.5 * weight / 12 for weight in (2, 4, 2, 4, 0)])


# ---- positions

ORDERS: dict[str, Callable[[], Order]] = {
    "easy ones go": lambda: HarderEpochs(10, True, 3, 0.5, 3),
    "easy ones go, in the file's order": lambda: HarderEpochs(10, False, 3, 0.5, 3),
    "learning progress": lambda: LearningProgress(range(10), 3, 0.1, 0.5),
    "learning progress of clusters": lambda: LearningProgress([0, 1, 2, 0, 1, 2, 0, 1, 2, 0], 3, 0.1, 0.5),
}


def shows(place: int, batch: int) -> Shown:
    """Something that depends on both, with gaps, and easier every time."""
    return Shown((place + batch) % 12 / 11, math.nan if (place + batch) % 5 == 0 else place * 0.1 + 0.01 * batch)


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("num_batches", [1, 2])
def test_a_run_resumed_after_any_step_reads_what_an_uninterrupted_one_would(name, num_batches):
    """Also where a step takes several batches, as with refill."""
    whole = PromptStream(PROMPTS, 3, ORDERS[name]())
    states, batches = [], []
    for _ in range(14):
        states.append(json.dumps(whole.state_dict()))
        batches.append(train(whole, shows, num_batches))
    for position, state in enumerate(states):
        resumed = PromptStream(PROMPTS, 3, ORDERS[name]())
        resumed.load_state_dict(json.loads(state))
        assert [train(resumed, shows, num_batches) for _ in batches[position:]] == batches[position:]
        assert resumed.state_dict() == whole.state_dict()


@pytest.mark.parametrize("name", ORDERS)
def test_a_look_ahead_sees_the_later_batch_of_the_step_and_changes_nothing(name):
    stream = PromptStream(PROMPTS, 4, ORDERS[name]())
    for _ in range(6):
        before = stream.state_dict()
        seen = [stream.upcoming(ahead) for ahead in range(2)]
        assert stream.state_dict() == before
        used = train(stream, shows, 2)
        assert [places(batch) for batch in seen] == [used[:4], used[4:]]


def test_a_run_goes_on_with_another_order():
    """From uniform epochs in the middle of the second, and back again."""
    uniform = PromptStream(PROMPTS, 4, Epochs(10, True, 3))
    for _ in range(3):
        uniform.next_batch()
    for make in ORDERS.values():
        stream = PromptStream(PROMPTS, 4, make())
        stream.load_state_dict(json.loads(json.dumps(uniform.state_dict())))
        assert (stream.prompts_seen, stream.epoch, stream.batches_seen) == (12, 1, 3)
        again = PromptStream(PROMPTS, 4, Epochs(10, True, 3))
        again.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        assert again.upcoming() == uniform.upcoming()
    harder = PromptStream(PROMPTS, 4, HarderEpochs(10, True, 3, 0.5, 4))
    harder.load_state_dict(uniform.state_dict())
    assert harder.upcoming() == uniform.upcoming()


def test_other_clusters_are_refused():
    saved = PromptStream(PROMPTS, 4, LearningProgress(range(10), 3, 0.1, 0.5)).state_dict()
    with pytest.raises(ValueError, match="saved with 10 clusters of prompts, resumed with 2"):
        PromptStream(PROMPTS, 4, LearningProgress([0, 1] * 5, 3, 0.1, 0.5)).load_state_dict(saved)


def test_settings_choose_the_order_and_without_a_curriculum_a_position_is_what_it_was():
    assert type(order_of(DataConfig(), PROMPTS, 4)) is Epochs
    assert type(order_of(DataConfig(drop_easy=0.5), PROMPTS, 4)) is HarderEpochs
    assert type(order_of(DataConfig(sampler="learning_progress"), PROMPTS, 4)) is LearningProgress
    stream = PromptStream(PROMPTS, 4, order_of(DataConfig(seed=3), PROMPTS, 4))
    assert stream.state_dict() == {"prompts_seen": 0, "batches_seen": 0, "num_prompts": 10, "seed": 3}
