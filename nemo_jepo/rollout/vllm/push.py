"""The trainer's end of a weight push: one pass over the weight stream, to every server at the same time.

    pause (requests in flight wait) -> no version -> tensors -> new version -> prefix cache dropped -> resume

A feed, a short queue of tensors, lies between the stream, which every rank of the trainer makes together, and the
thread that talks with the servers. Requests in flight go on afterwards: their prefix is computed again by the new
weights.

All servers receive in one group, so one that dies or stands still spoils the push for all of them. It is then given up:
servers that let go of it and are well stay paused, and wait for the same stream once more, without those that are lost.
"""

import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from nemo_jepo.config.schema import VLLMConfig
from nemo_jepo.rollout.vllm.channels import (
    GRACE_S,
    Channel,
    FileChannel,
    GlooChannel,
    NamedTensor,
    NCCLChannel,
    Shapes,
    SharedMemoryChannel,
    write_files,
)
from nemo_jepo.rollout.vllm.fleet import Control, Fleet, ServersFailed, failures_of

TENSORS_WAITING = 2
"""How many tensors the servers may lag behind the stream."""
NO_WEIGHTS = "none"
"""The version of a server's weights while a push changes them or it sleeps: nobody takes it for one that has them."""


@dataclass(frozen=True, slots=True)
class Pushed:
    """What became of the servers of one push."""

    updated: tuple[str, ...] = ()
    """They have the weights."""
    waiting: tuple[str, ...] = ()
    """They are well, paused and without the weights, and wait for them in another push."""
    lost: Mapping[str, str] = field(default_factory=dict)
    """The others, with one line that says why; they must not be sampled from."""
    stuck: frozenset[str] = frozenset()
    """Those of the lost that did not let go of the push when it was given up."""


class WeightTransfer:
    """Pushes weights to servers and keeps the connection between pushes.

    Args:
        control: calls a server's routes.
        settings: weight_transfer and sync_timeout_s are read.
        shapes: names and shapes of the stream's tensors, in order.
        dtype: of all of them.
        folder: where weight_transfer=file puts its files; the servers must see it under the same path.
    """

    def __init__(
        self, control: Control, settings: VLLMConfig, shapes: Shapes, dtype: torch.dtype, folder: Path
    ) -> None:
        self._control, self._settings, self._shapes, self._dtype = control, settings, shapes, dtype
        self._folder = folder.absolute()
        self._channel: Channel | None = None
        self._backend = settings.weight_transfer
        self._cuda_device = torch.cuda.current_device() if torch.cuda.is_available() else None
        if self._backend == "auto":
            self._backend = "nccl" if torch.cuda.is_available() else "gloo"

    def push(self, urls: Sequence[str], named_tensors: Iterable[NamedTensor], version: int) -> Pushed:
        """Bring servers to a version of the weights.

        Args:
            urls: servers that answer.
            named_tensors: read to its end, whatever happens to the servers.
            version: optimizer steps in these weights.
        """
        feed = _Feed(len(self._shapes), self._settings.sync_timeout_s)
        if self._backend == "file" and urls:
            write_files(named_tensors, self._folder)
            named_tensors = ()
        fleet = Fleet(self._control, urls)
        if self._channel is not None and self._channel.urls != fleet.urls:
            self.leave()
        if urls:
            feed.start(partial(self._exchange, fleet, feed, version))
        else:
            feed.end()
        try:
            for name, tensor in named_tensors:
                feed.put(Item(name, tensor, self._written()))
        finally:  # without the whole stream the exchange does not come to its end by itself
            feed.put(None)
            fault = feed.wait()
            self._channel = feed.channel
            pushed = Pushed(updated=fleet.urls) if fault is None else self._give_up(fleet, feed, fault)
        return pushed

    def _exchange(self, fleet: Fleet, feed: "_Feed", version: int) -> None:
        """All that is said to the servers, in the feed's thread."""
        if self._cuda_device is not None:
            torch.cuda.set_device(self._cuda_device)  # a new thread begins on device 0
        channel = self._channel
        if channel is not None and not channel.is_open(feed.remaining_s()):
            channel.close()
            channel = None
        channel = feed.take(channel or self._open(fleet))
        fleet.call("POST", "/pause", params={"mode": "keep"}, timeout_s=feed.remaining_s())
        unversioned = fleet.same({"new_version": NO_WEIGHTS})
        fleet.call("POST", "/update_weight_version", unversioned, timeout_s=feed.remaining_s())
        channel.send(feed, version, feed.remaining_s)
        reset = {"reset_running_requests": "true"}
        answers = fleet.call("POST", "/reset_prefix_cache", params=reset, timeout_s=feed.remaining_s())
        stale = {url: answer for url, answer in answers.items() if answer.get("success") is not True}
        if stale:
            why = "the cache of the old weights is still used"
            raise ServersFailed({url: f"{url}/reset_prefix_cache: {answer}: {why}" for url, answer in stale.items()})
        fleet.call("POST", "/resume", timeout_s=feed.remaining_s())

    def _give_up(self, fleet: Fleet, feed: "_Feed", fault: Exception) -> Pushed:
        """Let go of every server, and tell those that are well from those that are lost."""
        channel, blamed = feed.channel, dict(fault.reasons) if isinstance(fault, ServersFailed) else {}
        self.leave()
        updates = channel.updates if channel is not None else {}
        wait(updates.values(), timeout=GRACE_S)
        stuck = {url for url, update in updates.items() if not update.done()}

        # Lost is who was to blame, does not let go, or is not well; if none of them is, nobody knows who was
        others = fleet.only(url for url in fleet.urls if url not in blamed and url not in stuck)
        health = others.begin("GET", "/health", timeout_s=GRACE_S)
        wait(health.values())
        sick = failures_of(health)
        lost = [url for url in fleet.urls if url in blamed or url in stuck or url in sick] or list(fleet.urls)
        failed = failures_of(updates)
        reasons = {}
        for url in lost:
            missing = f"; {channel.missing(url, feed.num_sent)}" if channel is not None and url in stuck else ""
            reasons[url] = f"{blamed.get(url) or failed.get(url) or fault}. {feed.whereabouts()}{missing}"

        # None of them is resumed: half-loaded weights would be sampled with, which ends vLLM's engine
        waiting = tuple(url for url in fleet.urls if url not in lost)
        return Pushed(waiting=waiting, lost=reasons, stuck=frozenset(stuck))

    def _written(self) -> "torch.cuda.Event | None":
        """When what the caller's stream was given so far will be done; None without a GPU."""
        if self._cuda_device is None:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _open(self, fleet: Fleet) -> Channel:
        timeout_s = 2 * self._settings.sync_timeout_s  # a receiver's; the trainer's own time ends before it
        if self._backend == "file":
            return FileChannel(fleet, self._folder)
        if self._backend == "gloo":
            return GlooChannel(fleet, self._shapes, self._dtype, timeout_s)
        if self._backend == "shared_memory":
            return SharedMemoryChannel(fleet, self._shapes, self._dtype, timeout_s)
        return NCCLChannel(fleet, self._shapes, self._dtype, timeout_s)

    def leave(self) -> None:
        """Leave the servers' group; the next push opens another one."""
        channel, self._channel = self._channel, None
        if channel is not None:
            with suppress(Exception):  # a group that broke
                channel.close()

    def close(self) -> None:
        """Leave every group; files of a push go."""
        self.leave()
        shutil.rmtree(self._folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor of the stream on its way to the feed's thread."""

    name: str
    tensor: torch.Tensor
    written: "torch.cuda.Event | None"
    """Until then the tensor's memory is being written by a kernel or a collective; None without a GPU."""

    def on_this_stream(self) -> NamedTensor:
        """The tensor, for work on the current stream of this thread, whichever that is.

        The stream waits until the tensor is written, and its memory is not given away before the stream has read it.
        """
        if self.written is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.written)
            self.tensor.record_stream(stream)
        return self.name, self.tensor


class _Feed:
    """The tensors of one push: an iterator for the thread that sends them, with a deadline for both sides."""

    def __init__(self, num_tensors: int, timeout_s: float) -> None:
        self.channel: Channel | None = None
        self.num_sent = 0
        self._num_tensors, self._deadline = num_tensors, time.monotonic() + timeout_s
        self._waiting: queue.Queue[Item | None] = queue.Queue(TENSORS_WAITING)
        self._ended = threading.Event()
        self._fault: Exception | None = None
        self._last = "none"

    def start(self, work: Callable[[], None]) -> None:
        """Run the exchange."""

        def run() -> None:
            try:
                work()
            except Exception as error:
                self._fault = self._fault or error
            finally:
                self._ended.set()

        threading.Thread(target=run, name="weights to servers", daemon=True).start()

    def take(self, channel: Channel) -> Channel:
        """The connection of this push, if the push still goes on when it is open."""
        if self._fault is not None:
            channel.close()
            raise self._fault
        self.channel = channel
        return channel

    def end(self) -> None:
        """There is nobody to feed."""
        self._ended.set()

    def put(self, item: Item | None) -> None:
        """Hand the next tensor over, None after the last one; dropped once the exchange has ended or failed."""
        while not self._ended.is_set() and self._fault is None:
            try:
                return self._waiting.put(item, timeout=0.05)
            except queue.Full:
                self._look()

    def __iter__(self) -> Iterator[NamedTensor]:
        """The tensors, for the feed's thread; ends early, with an error, when the time is over."""
        while True:
            try:
                item = self._waiting.get(timeout=0.05)
            except queue.Empty:
                if self._fault is not None:
                    raise self._fault from None
                continue
            if item is None:
                if self.num_sent != self._num_tensors:
                    raise RuntimeError(f"the stream ended after {self.num_sent} of {self._num_tensors} tensors")
                return
            self.num_sent, self._last = self.num_sent + 1, item.name
            yield item.on_this_stream()

    def remaining_s(self) -> float:
        """Seconds until the deadline, and a moment for a last word after it."""
        return max(1.0, self._deadline - time.monotonic())

    def wait(self) -> Exception | None:
        """Wait for the end; what went wrong, None where nothing did."""
        while not self._ended.wait(0.05) and self._fault is None:
            self._look()
        return self._fault

    def _look(self) -> None:
        """Give up when the time is over, or when a server has ended its part: the others wait for it in vain."""
        if time.monotonic() > self._deadline:
            self._fault = TimeoutError("no weight sync within rollout.vllm.sync_timeout_s")
        elif self.channel is not None and (failed := failures_of(self.channel.updates)):
            self._fault = RuntimeError("; ".join(failed.values()))

    def whereabouts(self) -> str:
        """How far the push came."""
        if self.channel is None:
            return "No connection for weights was opened"
        return f"Sent {self.num_sent} of {self._num_tensors} tensors, the last {self._last}"
