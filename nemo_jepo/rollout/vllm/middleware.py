"""What stands before every route of vLLM's server: the key, and the way to have a server started again.

vLLM's own check of the key covers /v1 and /inference and leaves the development routes open.
"""

import asyncio
import os
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

RESTART_ROUTE = "/nemo_jepo/restart"
"""POST: the server ends, whatever state its engine is in, and its supervisor starts it again."""
RESTART_EXIT_CODE = 3
_ANSWERED_S = 0.2
"""Seconds in which the answer leaves before the process ends."""


class RequireKey:
    """ASGI middleware for vLLM's --middleware: the key on every route but GET /health."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app
        self._expected = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] == "lifespan" or scope.get("path") == "/health":
            return await self._app(scope, receive, send)
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not secrets.compare_digest(given, self._expected):
            if scope["type"] == "websocket":
                return await send({"type": "websocket.close", "code": 1008})
            return await _answer(send, 401, b'{"error": "the key is missing or wrong"}')
        if scope["type"] == "http" and scope["path"] == RESTART_ROUTE and scope["method"] == "POST":
            await _answer(send, 200, b'{"status": "it is started again"}')
            asyncio.get_running_loop().call_later(_ANSWERED_S, os._exit, RESTART_EXIT_CODE)
            return None
        return await self._app(scope, receive, send)


async def _answer(send: Any, status: int, body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body})
