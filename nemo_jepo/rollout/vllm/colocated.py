"""vLLM servers on the trainers' own GPUs: asleep while those train, awake while they sample.

    asleep --wake_weights--> weights --(push) wake_cache--> awake      sleep: back to asleep, from anywhere

Asleep, vLLM 0.32 keeps its CUDA graphs and no cache, at level 2 no weights either: the next push makes it useful again.
It wakes in two parts, because a push needs memory of its own, which the cache takes afterwards. With both parts awake
it takes requests. Source: vLLM 0.32, v1/engine/core.py (EngineCore.sleep, wake_up) and v1/worker/gpu_worker.py.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from enum import Enum

from torch import Tensor

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import VLLMConfig
from nemo_jepo.rollout.vllm.fleet import Control
from nemo_jepo.rollout.vllm.local import LocalServers
from nemo_jepo.rollout.vllm.pool import Pool
from nemo_jepo.rollout.vllm.push import NO_WEIGHTS, WeightTransfer
from nemo_jepo.rollout.vllm.sampler import VLLMSampler
from nemo_jepo.utils.http import ServerFault

TURN_TIMEOUT_S = 120.0
"""Seconds that a server may take to fall asleep or to wake."""

Faults = dict[str, str]
"""Server -> why it did not do what it was asked to."""


class Stage(Enum):
    """How much memory a server holds."""

    ASLEEP = "asleep"
    WEIGHTS = "awake without a cache"
    AWAKE = "awake"
    UNKNOWN = "in a stage that nobody knows"


class SleepingServers:
    """Puts servers to sleep and wakes them, and knows what each may hold.

    Args:
        control: calls a server's routes.
        urls: of the servers.
        level: rollout.vllm.sleep_level.
        stage: of all of them; a server starts awake.
    """

    def __init__(self, control: Control, urls: Iterable[str], level: int, stage: Stage) -> None:
        self._control, self._level = control, level
        self.stages = dict.fromkeys(urls, stage)

    def wake_weights(self, urls: Sequence[str]) -> Faults:
        """Give servers memory for weights, which a push must fill. RuntimeError unless they are asleep."""
        return self._wake(urls, "weights", Stage.ASLEEP, Stage.WEIGHTS)

    def wake_cache(self, urls: Sequence[str]) -> Faults:
        """Let servers that have new weights take requests. RuntimeError unless their weights alone are awake."""
        faults = self._wake(urls, "kv_cache", Stage.WEIGHTS, Stage.AWAKE)
        self._ask(list(faults), self._forget_version)
        return faults

    def sleep(self, urls: Sequence[str]) -> Faults:
        """Have servers drop all they hold; requests in flight are given up. Also of a server that sleeps already."""

        how = {"level": str(self._level), "mode": "abort"}

        def sleep(url: str) -> None:
            self._forget_version(url)
            self._control(url, "POST", "/sleep", params=how, timeout_s=TURN_TIMEOUT_S)

        faults = self._ask(urls, sleep)
        self.stages |= {url: Stage.ASLEEP for url in urls if url not in faults}
        return faults

    def _wake(self, urls: Sequence[str], tag: str, before: Stage, after: Stage) -> Faults:
        """Wake what has this tag of vLLM's."""
        for url in urls:
            if self.stages[url] is not before:
                raise RuntimeError(f"{url} is {self.stages[url].value}, and should be {before.value}")

        def wake(url: str) -> None:
            answer = self._control(url, "POST", "/wake_up", params={"tags": tag}, timeout_s=TURN_TIMEOUT_S)
            if after is Stage.AWAKE and answer.get("status") != "awake":
                raise ServerFault(url, "/wake_up", f"{answer}: a part of it sleeps")

        faults = self._ask(urls, wake)
        self.stages |= {url: Stage.UNKNOWN if url in faults else after for url in urls}
        return faults

    def _forget_version(self, url: str) -> None:
        self._control(url, "POST", "/update_weight_version", {"new_version": NO_WEIGHTS}, timeout_s=TURN_TIMEOUT_S)

    def _ask(self, urls: Sequence[str], request: Callable[[str], None]) -> Faults:
        """Make one request to each server, all at once."""

        def fault_of(url: str) -> str | None:
            try:
                request(url)
            except ServerFault as fault:
                return str(fault)
            return None

        if not urls:
            return {}
        with ThreadPoolExecutor(len(urls)) as threads:
            return {url: fault for url, fault in zip(urls, threads.map(fault_of, urls), strict=True) if fault}


class ColocatedSampler(VLLMSampler):
    """Samples from servers that sleep from `sleep` to the next `load_weights`.

    Args:
        sleep_level: rollout.vllm.sleep_level; the others are as VLLMSampler's.
    """

    def __init__(
        self,
        pool: Pool,
        transfer: WeightTransfer,
        own_servers: Sequence[str],
        marker: str,
        start_timeout_s: float,
        started: LocalServers | None,
        sleep_level: int,
    ) -> None:
        super().__init__(pool, transfer, own_servers, marker, start_timeout_s, started)
        self.servers = SleepingServers(pool.control, own_servers, sleep_level, Stage.ASLEEP)

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], policy_version: int) -> bool:
        """Wake the own servers and push the weights; what does not wake is out of the pool. See `Sampler`."""
        again = super().load_weights(named_tensors, policy_version)
        ready = [url for url in self._pool.ready() if self.servers.stages.get(url) is Stage.WEIGHTS]
        for url, fault in self.servers.wake_cache(ready).items():
            self._pool.take_out(url, fault)
        return again

    def sleep(self) -> Faults:
        """Put the own servers to sleep; nobody is sampled from before the next `load_weights`.

        Returns:
            Servers that live and do not sleep: their GPUs are not the trainers'.
        """
        self._pool.set_aside("it sleeps")
        faults = self.servers.sleep(self._own_servers)
        living = self._pool.answering(list(faults))
        self.servers.stages |= {url: Stage.ASLEEP for url in faults if url not in living}  # the dead hold nothing
        return {url: faults[url] for url in living}

    def _look_after_servers(self) -> None:
        """Start servers again that ended, while the GPUs are the servers', and wait: none may come up later."""
        if self._started is None:
            return
        again = self._started.restart_dead()
        late = self._pool.wait_for(again, self._ended, self._start_timeout_s)
        self._started.stop(late)

    def _reach(self) -> Mapping[str, str | None]:
        faults, stages = dict(super()._reach()), self.servers.stages
        asleep = [url for url, fault in faults.items() if fault is None and stages[url] is Stage.ASLEEP]
        faults |= dict.fromkeys((url for url in stages if stages[url] is Stage.UNKNOWN), "it did not wake")
        return faults | self.servers.wake_weights(asleep)


def put_to_sleep(servers: LocalServers, settings: VLLMConfig, key: str, vocab_size: int) -> None:
    """Wait until servers that were just started answer, and put them to sleep: the GPUs are the trainers' then.

    Raises:
        ConfigError: one of them ended, did not answer in time or does not sleep.
    """
    with closing(Pool(servers.urls, settings, key, vocab_size)) as pool:
        late = pool.wait_for(servers.urls, servers.ended, settings.start_timeout_s)
        faults = dict.fromkeys(late, "no answer within rollout.vllm.start_timeout_s") | servers.ended()
        sleeping = SleepingServers(pool.control, servers.urls, settings.sleep_level, Stage.AWAKE)
        faults = faults or sleeping.sleep(servers.urls)
    if faults:
        rule = "every server must start and sleep before the trainers take the GPUs, and " + "; ".join(
            f"{url}: {fault}" for url, fault in faults.items()
        )
        raise ConfigError("rollout.name", "vllm_colocated", rule, "Look into the servers' logs")
