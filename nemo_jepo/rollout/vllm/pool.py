"""Any number of vLLM servers as one sampler: least-loaded, health-checked, retried; a sample is never lost or doubled.

    admit(url, version)   after a weight sync: the server takes requests
    take_out(url, reason) it takes none until it is admitted again; those it had move to the others

One request is one sample, so results arrive as they finish and a retry repeats one sample. The samples of a prompt go
to one server while it lasts, whose prefix cache then holds the prompt. An event loop in a thread of its own does the
work; the public methods may be called from any other thread.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Container, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp

from nemo_jepo.config.schema import VLLMConfig
from nemo_jepo.rollout.sampler import GenerationRequest, SamplersLost, SamplingStopped, never
from nemo_jepo.rollout.vllm.client import Completion, StaleServer, VLLMServer
from nemo_jepo.types import Prompt, Rollout
from nemo_jepo.utils.http import JSONServer, NoAnswer, RequestRefused, ServerFault, backoff_s

log = logging.getLogger(__name__)

HEALTH_INTERVAL_S = 2.0
MAX_SILENCES = 3
"""A server whose /health, or whose engine, does not answer in time so often in a row is taken out; one that refuses,
at once."""
ENGINE_TIMEOUT_S = 30.0
"""Seconds in which a server's engine must say which weights it has. It does so between two of its steps, and not while
it takes weights; /health is answered by another process."""
MAX_FAULTS_IN_A_ROW = 4
"""A server that is well by its own account and fails this often without one success is taken out.

Requests that fail together are one fault.
"""
STOP_INTERVAL_S = 0.25
"""A batch that is to stop learns of it within so many seconds."""
KEEP_ALIVE_S = 2.0
"""Less than any server's own (uvicorn's is 5 s)."""

Result = TypeVar("Result")


@dataclass(slots=True, eq=False)
class _Member:
    """One server as the pool sees it; touched on the event loop only."""

    server: VLLMServer
    slots: asyncio.Semaphore
    out: str | None = "it has not been given weights yet"
    """Why it takes no requests; None while it does."""
    version: int = -1
    """Weights it was last given."""
    assigned: int = 0
    """Samples that wait for it or are with it."""
    faults_in_a_row: int = 0
    last_fault_s: float = 0.0
    """On the event loop's clock."""
    running: set[asyncio.Task[Completion]] = field(default_factory=set)
    checking: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(frozen=True, slots=True)
class _Batch:
    """What all samples of one `submit` share."""

    request: GenerationRequest
    stops: tuple[str, ...]
    only: _Member | None
    """The one server that may answer; its fault is then the caller's."""
    stop: Callable[[], bool]
    homes: dict[int, _Member] = field(default_factory=dict)
    """Group -> the server whose cache holds its prompt."""


class Pool:
    """Servers, requests in flight, and what became of them.

    Args:
        urls: http://HOST:PORT of every server; none is admitted yet.
        settings: rollout.vllm.
        key: of all servers.
        vocab_size: token ids are below it.
    """

    def __init__(self, urls: Sequence[str], settings: VLLMConfig, key: str, vocab_size: int) -> None:
        self.num_done = self.num_retried = self.num_failed = 0
        """Samples completed, attempts repeated, samples given up since the beginning."""
        self._settings = settings
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-pool", daemon=True)
        self._thread.start()
        self._members: dict[str, _Member] = self._wait(self._open(urls, key, vocab_size))
        self._closed = False
        self.takes_weights = False
        """Whether weights are being pushed to the servers: their engines have no time for questions."""

    async def _open(self, urls: Sequence[str], key: str, vocab_size: int) -> dict[str, _Member]:
        # The semaphores are the bound. A connection is not used again when the server may be closing it.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
        self._session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))
        # A control route that fails with 500 has its connection closed behind the answer: each has one of its own.
        once = aiohttp.TCPConnector(limit=0, force_close=True)
        self._control_session = aiohttp.ClientSession(connector=once, timeout=aiohttp.ClientTimeout(total=None))
        self._controls = {url: JSONServer(url, self._control_session, key) for url in urls}
        self._watching = [asyncio.ensure_future(watch) for watch in (self._watch(), self._watch_engines())]
        limit = self._settings.max_concurrency
        return {url: _Member(VLLMServer(url, self._session, key, vocab_size), asyncio.Semaphore(limit)) for url in urls}

    async def _watch(self) -> None:
        """Look after servers that have requests: one that died may hold them open for ever."""
        silences: dict[str, int] = {}
        while True:
            await asyncio.sleep(HEALTH_INTERVAL_S)
            busy = [member for member in self._members.values() if member.running and member.out is None]
            faults = await asyncio.gather(*(member.server.health() for member in busy), return_exceptions=True)
            for member, fault in zip(busy, faults, strict=True):
                late = isinstance(fault, NoAnswer)
                silences[member.server.url] = silences.get(member.server.url, 0) + 1 if late else 0
                if isinstance(fault, ServerFault) and (not late or silences[member.server.url] >= MAX_SILENCES):
                    self._take_out(member, str(fault))

    async def _watch_engines(self) -> None:
        """Look after engines that have requests: one that hangs may hold them for as long as a request may take."""
        silences: dict[str, int] = {}
        while True:
            await asyncio.sleep(HEALTH_INTERVAL_S)
            busy = [member for member in self._members.values() if member.running and member.out is None]
            if self.takes_weights or not busy:
                silences.clear()
                continue
            faults = await self._ask_engines([member.server.url for member in busy])
            for member, fault in zip(busy, faults, strict=True):
                late = isinstance(fault, NoAnswer) and not self.takes_weights
                silences[member.server.url] = silences.get(member.server.url, 0) + 1 if late else 0
                if silences[member.server.url] >= MAX_SILENCES:
                    self._take_out(member, str(fault))

    async def _ask_engines(self, urls: Sequence[str]) -> list[Any]:
        """What each server's engine answers, or the fault."""
        asked = (self._controls[url].control("GET", "/weight_info", timeout_s=ENGINE_TIMEOUT_S) for url in urls)
        return await asyncio.gather(*asked, return_exceptions=True)

    def _wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # Membership.

    def admit(self, url: str, version: int) -> None:
        """The server holds the weights of this optimizer step and takes requests."""

        async def admit(member: _Member) -> None:
            member.out, member.version, member.faults_in_a_row = None, version, 0

        self._wait(admit(self._members[url]))

    def take_out(self, url: str, reason: str) -> None:
        """The server takes no requests until it is admitted again; those that it has move."""

        async def take_out(member: _Member) -> None:
            self._take_out(member, reason)

        self._wait(take_out(self._members[url]))

    def set_aside(self, reason: str) -> None:
        """No server takes requests until it is admitted again, as is meant to be: nobody is warned."""

        async def set_aside() -> None:
            for member in self._members.values():
                member.out = member.out or reason

        self._wait(set_aside())

    def _take_out(self, member: _Member, reason: str) -> None:
        if member.out != reason:
            log.warning("%s takes no requests: %s", member.server.url, reason)
        member.out = reason
        for task in member.running:
            task.cancel()

    def ready(self) -> dict[str, int]:
        """The servers that take requests, with the version of their weights."""
        return {url: member.version for url, member in self._members.items() if member.out is None}

    def out(self) -> dict[str, str]:
        """The others, with the reason."""
        return {url: member.out for url, member in self._members.items() if member.out is not None}

    def answering(self, urls: Sequence[str]) -> list[str]:
        """Those of the servers whose /health answers now."""

        async def ask() -> list[BaseException | None]:
            return await asyncio.gather(*(self._members[url].server.health() for url in urls), return_exceptions=True)

        return [url for url, fault in zip(urls, self._wait(ask()), strict=True) if fault is None]

    def hanging(self, urls: Sequence[str]) -> dict[str, str]:
        """Those of the servers whose engine does not say which weights it has, and why: /health knows nothing of it."""
        faults = zip(urls, self._wait(self._ask_engines(urls)), strict=True)
        return {url: str(fault) for url, fault in faults if isinstance(fault, BaseException)}

    def wait_for(self, urls: Sequence[str], ended: Callable[[], Container[str]], timeout_s: float) -> list[str]:
        """Until each of the servers answers or is among those that have `ended`; returns those that are late."""
        deadline, waiting = time.monotonic() + timeout_s, list(urls)
        while waiting and time.monotonic() < deadline:
            answering, gone = self.answering(waiting), ended()
            waiting = [url for url in waiting if url not in answering and url not in gone]
            if waiting:
                time.sleep(0.5)
        return waiting

    def control(
        self,
        url: str,
        method: str,
        route: str,
        body: Mapping[str, Any] | None = None,
        params: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
    ) -> dict[str, Any]:
        """What a control route of one server answers; ServerFault where it does not."""
        return self._wait(self._controls[url].control(method, route, body, params, timeout_s))

    # Requests.

    def submit(
        self,
        prompts: Sequence[Prompt],
        request: GenerationRequest,
        stops: Sequence[str],
        only: str | None = None,
        stop: Callable[[], bool] = never,
    ) -> "Future[list[Rollout]]":
        """Begin every sample of every prompt.

        Args:
            stops: strings that end a completion.
            only: the one server that is to answer, without retries.
            stop: asked every STOP_INTERVAL_S on the event loop's thread; True ends the batch's requests.
        Returns:
            A future of the rollouts, ordered by (group, sample). A sample that no server would complete within
            max_attempts is in it as failed. Raises SamplersLost when no server is left, SamplingStopped when told to
            stop, ServerFault with `only`.
        """
        batch = _Batch(request, tuple(stops), self._members[only] if only else None, stop)
        return asyncio.run_coroutine_threadsafe(self._run(prompts, batch), self._loop)

    async def _run(self, prompts: Sequence[Prompt], batch: _Batch) -> list[Rollout]:
        samples = [
            asyncio.ensure_future(self._sample(batch, prompt, group, sample))
            for group, prompt in enumerate(prompts)
            for sample in range(batch.request.num_generations_per_prompt)
        ]
        waiting = set(samples)
        try:
            while waiting:
                if batch.stop():
                    raise SamplingStopped(f"told to stop with {len(waiting)} of {len(samples)} samples to come")
                done, waiting = await asyncio.wait(
                    waiting, timeout=STOP_INTERVAL_S, return_when=asyncio.FIRST_EXCEPTION
                )
                for task in done:
                    task.result()  # raises the first fault
            return [task.result() for task in samples]
        finally:
            for task in samples:
                task.cancel()
            await asyncio.gather(*samples, return_exceptions=True)

    async def _sample(self, batch: _Batch, prompt: Prompt, group: int, sample: int) -> Rollout:
        """One sample by whichever server completes it."""
        member, attempts = None, 0
        while attempts < self._settings.max_attempts:
            member = self._choose(batch, group, avoid=member)
            member.assigned += 1
            try:
                done = await self._attempt(batch, prompt, member)
            except ServerFault as fault:
                if batch.only is not None:
                    raise
                if isinstance(fault, RequestRefused):
                    log.warning("prompt %d: %s", prompt.prompt_id, fault)
                    break
                attempts += member.out is None  # that a server went says nothing about the request
                self.num_retried += 1
            else:
                self.num_done += 1
                drawn = (done.token_ids, done.logprobs, done.finish_reason, done.policy_version)
                return Rollout(group, sample, *drawn, untempered=batch.request.untempered)
            finally:
                member.assigned -= 1
            await asyncio.sleep(backoff_s(attempts))
        self.num_failed += 1
        return Rollout(group, sample, (), (), "failed", 0 if member is None else member.version)

    def _choose(self, batch: _Batch, group: int, avoid: _Member | None) -> _Member:
        """The server of the group's siblings if it can be had, else the least-loaded one; SamplersLost without any."""
        if batch.only is not None:
            return batch.only
        ready = [member for member in self._members.values() if member.out is None]
        if not ready:
            raise SamplersLost("; ".join(f"{url}: {reason}" for url, reason in self.out().items()))
        others = [member for member in ready if member is not avoid] or ready
        if batch.homes.get(group) not in others:
            batch.homes[group] = min(others, key=lambda member: member.assigned)
        return batch.homes[group]

    async def _attempt(self, batch: _Batch, prompt: Prompt, member: _Member) -> Completion:
        """One request; its fault has been held against the server when this raises ServerFault."""
        async with member.slots:
            if member.out is not None:
                raise ServerFault(member.server.url, "", member.out)
            work = member.server.complete(
                prompt.token_ids, batch.request, batch.stops, member.version, self._settings.request_timeout_s
            )
            task, began_s = asyncio.ensure_future(work), self._loop.time()
            member.running.add(task)
            try:
                completion = await asyncio.shield(task)
            except asyncio.CancelledError:
                if task.cancelled() and member.out is not None:  # by _take_out, not by our caller
                    raise ServerFault(member.server.url, "", member.out) from None
                raise
            except ServerFault as fault:
                await self._hold_against(member, fault, began_s)
                raise
            finally:
                member.running.discard(task)
                task.cancel()
        member.faults_in_a_row = 0
        return completion

    async def _hold_against(self, member: _Member, fault: ServerFault, began_s: float) -> None:
        """Take the server out if the fault, its own health or its record says so."""
        if isinstance(fault, RequestRefused):
            return
        if isinstance(fault, StaleServer):
            self._take_out(member, fault.what)
            return
        if began_s > member.last_fault_s:
            member.faults_in_a_row += 1
            member.last_fault_s = self._loop.time()
        async with member.checking:  # one look at its health for all requests that fail together
            if member.out is not None:
                return
            try:
                await member.server.health()
            except ServerFault as sick:
                self._take_out(member, f"{fault.what}; then {sick}")
                return
            if member.faults_in_a_row >= MAX_FAULTS_IN_A_ROW:
                self._take_out(member, f"{member.faults_in_a_row} faults in a row, the last: {fault.what}")

    def close(self) -> None:
        """End every request and the thread; futures that are open are cancelled."""
        if self._closed:
            return
        self._closed = True

        async def close() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await self._session.close()
            await self._control_session.close()

        self._wait(close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
