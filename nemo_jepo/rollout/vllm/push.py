"""The trainer's end of a weight push: one pass over the weight stream, to every server at the same time.

    pause (requests in flight wait) -> tensors -> new version -> prefix cache dropped -> resume

Each server has a feed: a short queue of tensors, and a thread with a connection of its own. A server that stands still
holds up the stream until its deadline, and then no more; those that wait meanwhile get that time back.
Requests in flight go on afterwards: their prefix is computed again by the new weights.
"""

import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from nemo_jepo.config.schema import VLLMConfig
from nemo_jepo.rollout.vllm.channels import (
    Channel,
    Control,
    FileChannel,
    GlooChannel,
    NamedTensor,
    NCCLChannel,
    Shapes,
    write_files,
)

TENSORS_WAITING = 2
"""How many tensors a server may lag behind the stream."""


class WeightTransfer:
    """Pushes weights to servers and keeps the connections between pushes.

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
        self._channels: dict[str, Channel] = {}
        self._backend = settings.weight_transfer
        self._cuda_device = torch.cuda.current_device() if torch.cuda.is_available() else None
        if self._backend == "auto":
            self._backend = "nccl" if torch.cuda.is_available() else "gloo"

    def push(self, urls: Sequence[str], named_tensors: Iterable[NamedTensor], version: int) -> dict[str, str | None]:
        """Bring servers to a version of the weights.

        Args:
            urls: servers that answer.
            named_tensors: read to its end, whatever happens to the servers.
            version: optimizer steps in these weights.
        Returns:
            For each server None, or in one line why it does not have them; it must not be sampled from then.
        """
        deadline = time.monotonic() + self._settings.sync_timeout_s
        if self._backend == "file":
            write_files(named_tensors, self._folder)
            named_tensors = ()
        feeds = [_Feed(url, len(self._shapes), deadline) for url in urls]
        for feed in feeds:
            feed.start(partial(self._update, feed, version))
        try:
            for name, tensor in named_tensors:
                item = Item(name, tensor, self._written())
                for feed in feeds:
                    feed.put(item, feeds)
        finally:  # without the whole stream no feed comes to its end by itself
            for feed in feeds:
                feed.put(None, feeds)
        faults = {feed.url: feed.fault() for feed in feeds}
        for url in [url for url, fault in faults.items() if fault]:
            self._channels.pop(url, None)
        return faults

    def _update(self, feed: "_Feed", version: int) -> None:
        """The whole exchange with one server, in its feed's thread."""
        if self._cuda_device is not None:
            torch.cuda.set_device(self._cuda_device)  # a new thread begins on device 0
        url = feed.url
        if url not in self._channels:
            self._channels[url] = self._open(url)
        feed.channel = self._channels[url]
        self._control(url, "POST", "/pause", params={"mode": "keep"}, timeout_s=feed.remaining_s())
        try:
            feed.channel.send(feed, version)
            reset = {"reset_running_requests": "true"}
            answer = self._control(url, "POST", "/reset_prefix_cache", params=reset, timeout_s=feed.remaining_s())
            if answer.get("success") is not True:
                raise RuntimeError(f"{url}/reset_prefix_cache: {answer}: the cache of the old weights is still used")
        except Exception:
            with suppress(Exception):  # the first error is the one to report
                self._control(url, "POST", "/resume", timeout_s=5.0)
            raise
        self._control(url, "POST", "/resume", timeout_s=feed.remaining_s())

    def _written(self) -> "torch.cuda.Event | None":
        """When what the caller's stream was given so far will be done; None without a GPU."""
        if self._cuda_device is None:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _open(self, url: str) -> Channel:
        timeout_s = 2 * self._settings.sync_timeout_s  # a feed may have to wait as long as another one's deadline
        if self._backend == "file":
            return FileChannel(self._control, url, self._folder, timeout_s)
        if self._backend == "gloo":
            return GlooChannel(self._control, url, self._shapes, self._dtype, timeout_s)
        return NCCLChannel(self._control, url, self._shapes, self._dtype, timeout_s)

    def close(self) -> None:
        """Leave every group; files of a push go."""
        self._channels.clear()
        shutil.rmtree(self._folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor of the stream on its way to the feeds' threads."""

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
    """The way to one server during one push: an iterator of tensors for its thread, with a deadline for both sides."""

    def __init__(self, url: str, num_tensors: int, deadline: float) -> None:
        self.url = url
        self.channel: Channel | None = None
        self._num_tensors, self._deadline = num_tensors, deadline
        self._waiting: queue.Queue[Item | None] = queue.Queue(TENSORS_WAITING)
        self._ended = threading.Event()
        self._fault: str | None = None
        self._num_sent, self._last = 0, "none"

    def start(self, work: Callable[[], None]) -> None:
        """Run the exchange."""

        def run() -> None:
            try:
                work()
            except Exception as error:
                self._fault = self._fault or f"{type(error).__name__}: {error}. {self._whereabouts()}"
            finally:
                self._ended.set()

        threading.Thread(target=run, name=f"weights to {self.url}", daemon=True).start()

    def put(self, item: Item | None, feeds: "Sequence[_Feed]") -> None:
        """Hand the next tensor over, None after the last one; dropped once the feed has failed.

        Args:
            feeds: all of the push; those that have nothing to do meanwhile lose no time.
        """
        while not self._ended.is_set() and self._fault is None:
            began = time.monotonic()
            try:
                return self._waiting.put(item, timeout=0.05)
            except queue.Full:
                self._check_time()
                for feed in feeds:
                    feed.give_back(time.monotonic() - began)

    def give_back(self, seconds: float) -> None:
        """Put off the deadline if the feed has sent all that it got."""
        if self._waiting.empty():
            self._deadline += seconds

    def __iter__(self) -> Iterator[NamedTensor]:
        """The tensors, for the feed's thread; ends early, with an error, when the time is over."""
        while True:
            try:
                item = self._waiting.get(timeout=0.05)
            except queue.Empty:
                if self._fault is not None:
                    raise RuntimeError(self._fault) from None
                continue
            if item is None:
                if self._num_sent != self._num_tensors:
                    raise RuntimeError(f"the stream ended after {self._num_sent} of {self._num_tensors} tensors")
                return
            self._num_sent, self._last = self._num_sent + 1, item.name
            yield item.on_this_stream()

    def remaining_s(self) -> float:
        """Seconds until the deadline, and a moment for a last word after it."""
        return max(1.0, self._deadline - time.monotonic())

    def fault(self) -> str | None:
        """Wait for the end; None if the server has the weights, else why not."""
        while not self._ended.wait(0.05) and self._fault is None:
            self._check_time()
        return self._fault

    def _check_time(self) -> None:
        if time.monotonic() > self._deadline:
            self._fault = f"no weight sync within rollout.vllm.sync_timeout_s. {self._whereabouts()}"

    def _whereabouts(self) -> str:
        if self.channel is None:
            return "No connection for weights was opened"
        where = f"Sent {self._num_sent} of {self._num_tensors} tensors, the last {self._last}"
        return f"{where}; {self.channel.missing(self._num_sent)}"
