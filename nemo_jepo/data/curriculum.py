"""Orders of prompts that follow what was learnt: easy ones are left out, or those come more often that teach more.

    drop_easy            epoch e + 1 has the prompts of epoch e whose last pass rate is below the threshold
    learning_progress    P(p) = floor / N + (1 - floor) w_p / sum_q w_q,    w_p = m of p's cluster
                         m <- keep m + (1 - keep) s,    s the mean spread of the cluster's prompts in a step

N prompts. A cluster that was never seen has the largest m of those that were, and the first s of one is its m. What
pass rate and spread are is said in `nemo_jepo.lessons`.

Source: leaving out easy problems from epoch to epoch is of arXiv 2505.16400 (AceReason-Nemotron).
"""

import base64
import math
import random
from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import DataConfig
from nemo_jepo.data.stream import Epochs, Order, Shown, TiedEpochs, groups_of, permuted
from nemo_jepo.types import Prompt


def order_of(config: DataConfig, prompts: Sequence[Prompt], num_prompts_per_step: int, num_replicas: int = 1) -> Order:
    """The order that the settings ask for.

    Args:
        num_replicas: a batch is dealt over so many, in whole groups.
    """
    if config.group_key is not None:
        return tied(groups_of(prompts), config, num_prompts_per_step, num_replicas)
    if config.sampler == "learning_progress":
        keep = config.sampler_exponential_mean
        return LearningProgress(clusters_of(prompts), config.seed, config.sampler_floor, keep)
    if config.drop_easy is not None:
        return HarderEpochs(len(prompts), config.shuffle, config.seed, config.drop_easy, num_prompts_per_step)
    return Epochs(len(prompts), config.shuffle, config.seed)


def tied(
    groups: Sequence[Sequence[int]], config: DataConfig, num_prompts_per_step: int, num_replicas: int
) -> TiedEpochs:
    """The order of groups of prompts.

    Raises:
        ConfigError: their sizes differ, or do not divide a replica's part of a batch.
    """
    sizes = sorted({len(group) for group in groups})
    if config.verifier == "judgement" and sizes != [2]:
        rule = f"groups of {' and '.join(map(str, sizes))} rows, and a pair of judgements has 2"
        raise ConfigError("data.group_key", config.group_key, rule, "Mend the file, or name the pair's field")
    if len(sizes) > 1:
        rule = f"groups of {' and '.join(map(str, sizes))} rows: all must have one size"
        raise ConfigError("data.group_key", config.group_key, rule, "Mend the file")
    if num_prompts_per_step % (sizes[0] * num_replicas):
        rule = f"must be a multiple of {sizes[0] * num_replicas}: groups of {sizes[0]} rows on {num_replicas} replicas"
        raise ConfigError("trainer.jepo.num_prompts_per_step", num_prompts_per_step, rule, "Change it")
    return TiedEpochs(groups, config.shuffle, config.seed)


def clusters_of(prompts: Sequence[Prompt]) -> list[int]:
    """The number of each prompt's cluster, counted in the order of their first prompts; without a name, one of its own.

    Either all prompts have a name or none has.
    """
    numbers: dict[object, int] = {}
    names = (place if prompt.cluster is None else prompt.cluster for place, prompt in enumerate(prompts))
    return [numbers.setdefault(name, len(numbers)) for name in names]


class HarderEpochs:
    """As Epochs, but an epoch begins without the prompts that had become easy when it began.

    An epoch begins when its first prompt is handed out. So a batch that crosses into one is chosen by what the batches
    before it have shown, and what it shows itself counts one epoch later. Who is left out does not come back.

    Args:
        num_prompts, shuffle, seed: as of Epochs.
        threshold: a prompt is easy whose last pass rate is at least so much. One without any is not.
        smallest: so many prompts stay in any case, those with the lowest pass rates, of equal ones the first.
    """

    learns = True

    def __init__(self, num_prompts: int, shuffle: bool, seed: int, threshold: float, smallest: int) -> None:
        self.seed = seed
        self._shuffle = shuffle
        self._threshold = threshold
        self._smallest = smallest
        self._pass_rates = [math.nan] * num_prompts
        self._begin(0, range(num_prompts))

    def _begin(self, number: int, left: Iterable[int], taken: int = 0) -> None:
        self._number = number
        self._left = list(left)
        self._permuted = permuted(self._left, number, self._shuffle, self.seed)
        self._taken = taken
        """Prompts of this epoch that were handed out."""

    @property
    def epoch(self) -> int:
        """See Order: passes over what each epoch had."""
        return self._number + (self._taken == len(self._left))

    def take(self, count: int) -> list[int]:
        """See Order."""
        places: list[int] = []
        while len(places) < count:
            if self._taken == len(self._left):
                self._begin(self._number + 1, self._hard())
            part = self._permuted[self._taken : self._taken + count - len(places)]
            self._taken += len(part)
            places += part
        return places

    def learn(self, places: Sequence[int], shown: Sequence[Shown]) -> None:
        """See Order."""
        for place, one in zip(places, shown, strict=True):
            if not math.isnan(one.pass_rate):
                self._pass_rates[place] = one.pass_rate

    def metrics(self) -> dict[str, float]:
        """Prompts of the epoch at hand."""
        return {"prompts_left": float(len(self._left))}

    def state_dict(self) -> dict[str, Any]:
        """See Order."""
        return {
            "epoch": self._number,
            "taken": self._taken,
            "left": _packed("q", self._left),
            "pass_rates": _packed("d", self._pass_rates),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Order. A run that has left nobody out so far goes on with all."""
        everything = range(len(self._pass_rates))
        if "left" not in state:
            number, taken = divmod(state["prompts_seen"], len(everything))
            self._begin(number, everything, taken)
            return
        self._pass_rates = _unpacked("d", state["pass_rates"])
        self._begin(state["epoch"], _unpacked("q", state["left"]), state["taken"])

    def _hard(self) -> list[int]:
        """Who stays for the next epoch."""

        def rate(place: int) -> float:
            known = self._pass_rates[place]
            return -math.inf if math.isnan(known) else known

        num_hard = sum(rate(place) < self._threshold for place in self._left)
        hardest_first = sorted(self._left, key=rate)  # stable: of equal ones the first
        return sorted(hardest_first[: max(num_hard, self._smallest)])


class LearningProgress:
    """Prompts are drawn, with replacement, likelier the more their cluster's samples have differed.

    A batch depends on the seed, its number and what was learnt before it.

    Args:
        clusters: [N] the number of each prompt's cluster, from 0.
        seed: of the draws.
        floor: share of the draws that is uniform.
        keep: what a new spread leaves of the mean of the earlier ones.
    """

    learns = True

    def __init__(self, clusters: Sequence[int], seed: int, floor: float, keep: float) -> None:
        self.seed = seed
        self._clusters = clusters
        self._floor = floor
        self._keep = keep
        self._means = [math.nan] * (max(clusters) + 1)
        self._seen = self._batches = 0
        self._cumulative = list(accumulate(self.probabilities()))

    @property
    def epoch(self) -> int:
        """See Order: as many draws as there are prompts."""
        return self._seen // len(self._clusters)

    def probabilities(self) -> list[float]:
        """[N] P(p)."""
        largest = max((mean for mean in self._means if not math.isnan(mean)), default=1.0)
        weights = [largest if math.isnan(mean) else mean for mean in self._means]
        of_prompts = [weights[cluster] for cluster in self._clusters]
        total, uniform = math.fsum(of_prompts), 1 / len(self._clusters)
        if total == 0:
            return [uniform for _ in of_prompts]
        return [self._floor * uniform + (1 - self._floor) * weight / total for weight in of_prompts]

    def take(self, count: int) -> list[int]:
        """See Order."""
        draws = random.Random(f"batch {self._batches} of seed {self.seed}")
        self._seen += count
        self._batches += 1
        return draws.choices(range(len(self._clusters)), cum_weights=self._cumulative, k=count)

    def learn(self, places: Sequence[int], shown: Sequence[Shown]) -> None:
        """See Order."""
        spreads: dict[int, list[float]] = {}
        for place, one in zip(places, shown, strict=True):
            if not math.isnan(one.spread):
                spreads.setdefault(self._clusters[place], []).append(one.spread)
        for cluster, found in spreads.items():
            old, new = self._means[cluster], math.fsum(found) / len(found)
            self._means[cluster] = new if math.isnan(old) else self._keep * old + (1 - self._keep) * new
        self._cumulative = list(accumulate(self.probabilities()))

    def metrics(self) -> dict[str, float]:
        """How many prompts the draws are spread over: 1 / sum_p P(p)^2, N where all are alike."""
        return {"sampler_effective_prompts": 1 / math.fsum(p * p for p in self.probabilities())}

    def state_dict(self) -> dict[str, Any]:
        """See Order."""
        return {"mean_spreads": _packed("d", self._means)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Order. A run that was uniform so far has seen nothing.

        Raises:
            ValueError: there were other clusters.
        """
        self._seen, self._batches = state["prompts_seen"], state["batches_seen"]
        if "mean_spreads" in state:
            means = _unpacked("d", state["mean_spreads"])
            if len(means) != len(self._means):
                saved = f"saved with {len(means)} clusters of prompts, resumed with {len(self._means)}"
                raise ValueError(f"{saved}. Resume with the data.cluster_key of the saved run.")
            self._means = means
        self._cumulative = list(accumulate(self.probabilities()))


def _packed(kind: str, numbers: Sequence[float]) -> str:
    """Numbers as a text that gives them back bit for bit: a tenth of what a line for each takes in a checkpoint."""
    return base64.b64encode(array(kind, numbers).tobytes()).decode()


def _unpacked(kind: str, text: str) -> list[Any]:
    numbers = array(kind)
    numbers.frombytes(base64.b64decode(text))
    return numbers.tolist()
