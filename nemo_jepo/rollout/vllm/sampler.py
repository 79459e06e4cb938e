"""The sampler over a pool of vLLM servers: requests out, rollouts in, weights across after every update.

    load_weights   one pass over the weight stream to the own servers; those that have it all are admitted
    submit         every sample to an admitted server; one that fails moves to another

Each replica's first rank holds one. All of them draw from every server; each feeds some of the servers.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress

from torch import Tensor

from nemo_jepo.rollout.sampler import GenerationRequest, never
from nemo_jepo.rollout.vllm.client import stop_strings
from nemo_jepo.rollout.vllm.local import LocalServers
from nemo_jepo.rollout.vllm.middleware import RESTART_ROUTE
from nemo_jepo.rollout.vllm.pool import Pool
from nemo_jepo.rollout.vllm.push import Pushed, WeightTransfer
from nemo_jepo.types import Prompt, Rollout
from nemo_jepo.utils.http import ServerFault

log = logging.getLogger(__name__)

MAX_REFUSALS = 2
"""Weight syncs in a row that a server may spoil although it answers; then its supervisor starts it again."""


class VLLMSampler:
    """Samples from vLLM servers; see `nemo_jepo.rollout.sampler.Sampler`.

    Args:
        pool: every server of the run.
        transfer: brings weights to servers.
        own_servers: those of the pool that this sampler feeds; another replica's sampler feeds the others.
        marker: of the answer; a completion that stops at it stops at one of its spellings.
        start_timeout_s: how long the first sync waits for the own servers.
        started: servers that this rank started itself, started again when they die; None without any.
    """

    def __init__(
        self,
        pool: Pool,
        transfer: WeightTransfer,
        own_servers: Sequence[str],
        marker: str,
        start_timeout_s: float,
        started: LocalServers | None,
    ) -> None:
        self._pool = pool
        self._transfer = transfer
        self._own_servers = tuple(own_servers)
        self._stop_strings = stop_strings(marker)
        self._start_timeout_s = start_timeout_s
        self._started = started
        self._policy_version: int | None = None
        self._waiting: tuple[str, ...] = ()
        """Own servers that want the last weights once more, because another was lost while they came."""
        self._refusals = dict.fromkeys(self._own_servers, 0)
        """Of each own server, since it last took weights."""
        self._hanging: set[str] = set()
        """Own servers whose engine did not answer before this push."""

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], policy_version: int) -> bool:
        """Push the weights to the own servers; one that could not take them is out of the pool. See `Sampler`."""
        targets, unreachable = self._waiting, dict[str, str]()
        self._hanging.clear()
        if not self._waiting or policy_version != self._policy_version:
            self._look_after_servers()
            unreachable = {url: fault for url, fault in self._reach().items() if fault is not None}
            targets = tuple(url for url in self._own_servers if url not in unreachable)
        self._pool.takes_weights = True
        try:
            pushed = self._transfer.push(targets, named_tensors, policy_version)
        finally:
            self._pool.takes_weights = False
        for url in pushed.updated:
            self._pool.admit(url, policy_version)
        for url, fault in (unreachable | dict(pushed.lost)).items():
            self._pool.take_out(url, fault)
        for url in pushed.waiting:
            self._pool.take_out(url, "it waits for weights that another server's loss has held up")
        self._count_refusals(pushed)
        self._waiting, self._policy_version = pushed.waiting, policy_version
        return bool(self._waiting)

    def submit(
        self, prompts: Sequence[Prompt], request: GenerationRequest, stop: Callable[[], bool] = never
    ) -> "Future[list[Rollout]]":
        """Begin every sample; `stop` is asked while they are drawn. See `Sampler`.

        Raises:
            RuntimeError: no weights were loaded.
        """
        self._admit_fed_by_others()
        stops = self._stop_strings if request.stop_at_marker else ()
        return self._pool.submit(prompts, request, stops, stop=stop)

    def probe(self, prompts: Sequence[Prompt], request: GenerationRequest) -> dict[str, list[Rollout]]:
        """The same completions by every own server that has the weights; one that fails is out. See `Sampler`."""
        self._admit_fed_by_others()
        ready = self._pool.ready()
        futures = {url: self._pool.submit(prompts, request, (), only=url) for url in self._own_servers if url in ready}
        drawn = {}
        for url, future in futures.items():
            try:
                drawn[url] = future.result()
            except ServerFault as fault:
                self._pool.take_out(url, str(fault))
        return drawn

    def counts(self) -> dict[str, float]:
        """What went wrong so far, for the metrics: retried attempts, failed samples; and the servers in use."""
        return {
            "retried_attempts": self._pool.num_retried,
            "failed_samples": self._pool.num_failed,
            "servers": len(self._pool.ready()),
        }

    def close(self) -> None:
        """End requests and connections; the servers go on."""
        self._pool.close()
        self._transfer.close()

    def _ended(self) -> dict[str, str]:
        """Servers of this rank's own that are not running, and why."""
        return self._started.ended() if self._started is not None else {}

    def _look_after_servers(self) -> None:
        """Before the first weights wait for the own servers, later start again those that ended."""
        if self._policy_version is None:
            self._pool.wait_for(self._own_servers, self._ended, self._start_timeout_s)
        elif self._started is not None:
            self._started.restart_dead()

    def _reach(self) -> Mapping[str, str | None]:
        """For each own server None, or why it can be given no weights.

        A server whose engine hangs answers /health, and would hold a push up for all the others.
        """
        answering, ended = self._pool.answering(self._own_servers), self._ended()
        hanging = self._pool.hanging(answering)
        self._hanging |= set(hanging)
        silent = dict.fromkeys(self._own_servers, "/health does not answer") | ended
        return {url: hanging.get(url) if url in answering else silent[url] for url in self._own_servers}

    def _count_refusals(self, pushed: Pushed) -> None:
        """Have servers started again that answer and take no weights, after the second time.

        At once where they do not let go of a push, or where no other is left: the run may be over, and the next one
        would find them as they are.
        """
        self._refusals |= dict.fromkeys(pushed.updated, 0)
        others = pushed.updated or pushed.waiting
        for url in self._pool.answering([*pushed.lost, *self._hanging]):
            self._refusals[url] += 1 if others and url not in pushed.stuck else MAX_REFUSALS
            if self._refusals[url] >= MAX_REFUSALS:
                self._refusals[url] = 0
                log.warning("%s takes no weights and is to be started again", url)
                with suppress(ServerFault):  # its supervisor starts one again that does not answer at all
                    self._pool.control(url, "POST", RESTART_ROUTE, timeout_s=5.0)

    def _admit_fed_by_others(self) -> None:
        """Servers that another replica gave the current weights, by what they say themselves."""
        if self._policy_version is None:
            raise RuntimeError("load_weights must be called before completions are asked for")
        fed_by_others = {**self._pool.ready(), **dict.fromkeys(self._pool.out(), -1)}
        for url, version in fed_by_others.items():
            if url in self._own_servers or version == self._policy_version:
                continue
            try:
                label = self._pool.control(url, "GET", "/weight_info", timeout_s=5.0)["weight_version"]
            except ServerFault as fault:
                self._pool.take_out(url, str(fault))
                continue
            if label == str(self._policy_version):
                self._pool.admit(url, self._policy_version)
            else:
                self._pool.take_out(url, f"has the weights {label!r}, not those of step {self._policy_version}")
