"""The rows that say most in the fewest bytes: greedy selection by compression ratio (ZIP)."""

import zlib
from collections.abc import Sequence
from heapq import nsmallest

from tqdm import tqdm

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.tools.prepare.records import Example, Splits
from nemo_jepo.tools.prepare.steps import Account, Step, dropped, whole_number

POOL, CANDIDATES, GROUP = 10_000, 200, 100
"""K1, K2, K3 of the paper."""


class Compressed:
    """A text that grows. zlib keeps its state, so that the ratio with one more text costs that text alone."""

    def __init__(self) -> None:
        self._state, self._read, self._written = zlib.compressobj(9), 0, 0

    def add(self, text: bytes) -> None:
        """The text is longer by this one."""
        self._written += len(self._state.compress(text))
        self._read += len(text)

    def ratio_with(self, text: bytes) -> float:
        """len(all) / len(zlib(all)), all being the text so far and this one behind it."""
        state = self._state.copy()
        written = self._written + len(state.compress(text)) + len(state.flush())
        return (self._read + len(text)) / written


def select_zip(
    texts: Sequence[str], count: int, *, pool: int = POOL, candidates: int = CANDIDATES, group: int = GROUP
) -> list[int]:
    """Numbers of `count` texts, in the order of their choice. A low compression ratio says little twice.

        ratio(S) = len(S) / len(zlib(S)), level 9, of texts with a line end behind each

    Every text has a score, at first its own ratio. Until enough are chosen:
    1. of the texts left, the `pool` of lowest score get a new one, ratio(all chosen so far + the text);
    2. of these the `candidates` of lowest score are looked at more closely:
    3. `group` of them are chosen one by one, each time the one with the lowest ratio(this group so far + the text).
    The earlier of equal texts goes first. zlib looks back 32 kB, so "chosen so far" is what was chosen last.

    Args:
        count: at most the number of texts.
    Source: arXiv 2407.06645, Algorithm 1. The authors' program also throws away, for good, the candidates of a round
        that were not chosen; here they stay among the texts left, as in the paper.
    """
    data = [f"{text}\n".encode() for text in texts]
    scores = [Compressed().ratio_with(text) for text in data]
    left, everything = set(range(len(data))), Compressed()
    chosen: list[int] = []

    def lowest(most: int, among: Sequence[int] | set[int]) -> list[int]:
        return nsmallest(most, among, key=lambda number: (scores[number], number))

    with tqdm(total=count, desc="zip", unit="row", mininterval=1, dynamic_ncols=True) as bar:
        while len(chosen) < count:
            nearest = lowest(pool, left)
            for number in nearest:
                scores[number] = everything.ratio_with(data[number])
            closer, together = lowest(candidates, nearest), Compressed()
            for _ in range(min(group, len(closer), count - len(chosen))):
                best = min(closer, key=lambda number: (together.ratio_with(data[number]), number))
                for text in (together, everything):
                    text.add(data[best])
                closer.remove(best)
                left.remove(best)
                chosen.append(best)
                bar.update()
    return chosen


def text_of(example: Example) -> str:
    """What a supervised run reads of a row: question, chain of thought, answer."""
    return "\n".join(text for text in (example.question, example.chain_of_thought, example.answer) if text)


def select_step(value: str) -> Step:
    """--select zip:N: N training rows stay, in the published order.

    Raises:
        ConfigError: another method, no such number; later, fewer training rows than that.
    """
    method, _, number = value.partition(":")
    if method != "zip":
        raise ConfigError("--select", value, "must be zip:N", "Give for example zip:10000")
    count = whole_number("--select zip:N", number, least=1, example=10_000)

    def apply(splits: Splits) -> tuple[Splits, Account]:
        rows = splits["train"]
        if count > len(rows):
            raise ConfigError("--select", value, f"{len(rows)} training rows are left", f"Ask for at most {len(rows)}")
        chosen = set(select_zip([text_of(example) for _, example in rows], count))
        account = {"method": method, "zlib": zlib.ZLIB_RUNTIME_VERSION, "k1_k2_k3": [POOL, CANDIDATES, GROUP]}
        return dropped(splits, [number in chosen for number in range(len(rows))], account)

    return Step("select", apply, drops=True)
