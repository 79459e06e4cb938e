"""Control routes of several servers, called at the same time."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from functools import partial
from typing import Any

import torch

Control = Callable[..., dict[str, Any]]
"""`nemo_jepo.rollout.vllm.pool.Pool.control`: calls a control route of a server."""


class ServersFailed(RuntimeError):
    """Some of the servers did not do what they were told.

    Args:
        reasons: why not, for each of them.
    """

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__("; ".join(reasons.values()))
        self.reasons = dict(reasons)


class Fleet:
    """Servers that are told the same at the same time.

    Args:
        control: calls a route of one server.
        urls: of all of them.
    """

    def __init__(self, control: Control, urls: Sequence[str]) -> None:
        self.urls = tuple(urls)
        self._control = control

    def begin(
        self, method: str, route: str, bodies: Mapping[str, Any] | None = None, **options: Any
    ) -> dict[str, "Future[dict[str, Any]]"]:
        """The answers to come, by server; a call that is never answered keeps no program alive.

        Args:
            bodies: what each server is sent.
            options: params and timeout_s, as Control takes them.
        """

        def call(url: str) -> dict[str, Any]:
            return self._control(url, method, route, None if bodies is None else bodies[url], **options)

        return {url: in_thread(partial(call, url)) for url in self.urls}

    def call(
        self, method: str, route: str, bodies: Mapping[str, Any] | None = None, **options: Any
    ) -> dict[str, dict[str, Any]]:
        """The answers, once all servers have given theirs; arguments as `begin`.

        Raises:
            ServersFailed: at least one gave none.
        """
        return answers_of(self.begin(method, route, bodies, **options))

    def only(self, urls: Iterable[str]) -> "Fleet":
        """These servers among them."""
        return Fleet(self._control, list(urls))

    def same(self, body: Any) -> dict[str, Any]:
        """One body for all servers."""
        return dict.fromkeys(self.urls, body)


def answers_of(calls: Mapping[str, "Future[dict[str, Any]]"]) -> dict[str, dict[str, Any]]:
    """The answers of calls that were begun; raises ServersFailed where one has none."""
    wait(calls.values())
    if failed := failures_of(calls):
        raise ServersFailed(failed)
    return {url: future.result() for url, future in calls.items()}


def failures_of(calls: Mapping[str, "Future[dict[str, Any]]"]) -> dict[str, str]:
    """Servers whose call has failed so far, and why."""
    errors = {url: future.exception() for url, future in calls.items() if future.done()}
    return {url: f"{type(error).__name__}: {error}" for url, error in errors.items() if error is not None}


def in_thread(work: Callable[[], Any]) -> "Future[Any]":
    """The result of a call in a thread that does not keep the program alive: a lost peer may hold it for long.

    The thread has this one's GPU; by itself it would begin with the first.
    """
    future: Future[Any] = Future()
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def opened(opening: "Future[Any]", calls: Callable[[], Mapping[str, "Future[Any]"]]) -> Any:
    """What is opened together with servers, once it is open.

    Args:
        calls: those that ask the servers to take part, as far as they have begun.
    Raises:
        ServersFailed: as soon as a server refuses; what waits for it to come is left to its own timeout.
    """
    while not opening.done():
        if failed := failures_of(calls()):
            raise ServersFailed(failed)
        wait([opening, *calls().values()], timeout=0.1, return_when=FIRST_EXCEPTION)
    return opening.result()
