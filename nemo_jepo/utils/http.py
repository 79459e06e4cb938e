"""JSON over HTTP: one request to one server, its answer checked, every fault by name. Rollouts and judges use it."""

import asyncio
import json
import random
from collections.abc import Mapping
from typing import Any

import aiohttp

MAX_ANSWER_BYTES = 64 * 2**20
"""No honest answer is longer; a server that never ends one must not take the host's memory."""
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.2, 10.0
_JITTER = random.Random()
"""Of its own: a retry must not shift a run's random numbers."""


class ServerFault(Exception):
    """A server did not answer, or answered what cannot be used: server, route, what was wrong."""

    def __init__(self, url: str, route: str, what: str) -> None:
        super().__init__(f"{url}{route}: {what}")
        self.what = what


class NoAnswer(ServerFault):
    """Nothing came in time; the server may be busy."""


class RequestRefused(ServerFault):
    """The server is well and says that the request is wrong: no other server would answer it."""


def backoff_s(attempts: int) -> float:
    """Seconds to wait after so many failed attempts, spread so that requests that failed together do not return so."""
    return min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2**attempts) * _JITTER.uniform(0.5, 1.0)


class JSONServer:
    """A server whose routes take and answer JSON objects.

    Args:
        url: http://HOST:PORT, or a longer base of all routes.
        session: with no timeout of its own.
        key: sent as a bearer token with every request; None sends none.
    """

    def __init__(self, url: str, session: aiohttp.ClientSession, key: str | None) -> None:
        self.url = url
        self._session = session
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    async def control(
        self,
        method: str,
        route: str,
        body: Mapping[str, Any] | None = None,
        params: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
    ) -> dict[str, Any]:
        """The JSON object that a route answers ({} for an empty answer).

        Raises:
            ServerFault: no connection, no answer in time, a status other than 200, or no JSON object.
        """
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session.request(
                    method, self.url + route, json=body, params=params, headers=self._headers, allow_redirects=False
                ) as response,
            ):
                raw = await self._read_all(response, route)
                if response.status != 200:
                    kind = RequestRefused if response.status in (400, 413, 422) else ServerFault
                    raise kind(self.url, route, f"status {response.status}: {shown(raw, 300)}")
        except TimeoutError as error:
            raise NoAnswer(self.url, route, f"no answer within {timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ServerFault(self.url, route, f"{type(error).__name__}: {error}") from error
        try:
            answer = json.loads(raw) if raw else {}
        except (ValueError, RecursionError) as error:
            raise ServerFault(self.url, route, f"not JSON: {shown(raw, 80)}") from error
        if not isinstance(answer, dict):
            raise ServerFault(self.url, route, f"not a JSON object: {shown(raw, 80)}")
        return answer

    async def _read_all(self, response: aiohttp.ClientResponse, route: str) -> bytes:
        raw = bytearray()
        async for chunk in response.content.iter_any():
            raw += chunk
            if len(raw) > MAX_ANSWER_BYTES:
                raise ServerFault(self.url, route, f"an answer of more than {MAX_ANSWER_BYTES >> 20} MiB")
        return bytes(raw)


def shown(raw: bytes, length: int) -> str:
    """The beginning of what a server sent, on one plain line."""
    return ascii(raw[:length].decode(errors="replace").strip())[1:-1]
