"""The key before vLLM's routes, and the route that has a server started again."""

import asyncio
from typing import Any

import pytest

from nemo_jepo.rollout.vllm import middleware
from nemo_jepo.rollout.vllm.middleware import RESTART_EXIT_CODE, RESTART_ROUTE, RequireKey


@pytest.fixture
def exits(monkeypatch) -> list[int]:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    monkeypatch.setattr(middleware, "_ANSWERED_S", 0.0)
    codes: list[int] = []
    monkeypatch.setattr(middleware.os, "_exit", codes.append)
    return codes


def status(path: str, method: str = "POST", key: str = "secret") -> int:
    """What a request is answered; 299 by vLLM itself."""
    sent: list[dict[str, Any]] = []

    async def vllm(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 299})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def ask() -> None:
        headers = [(b"authorization", f"Bearer {key}".encode())]
        await RequireKey(vllm)({"type": "http", "path": path, "method": method, "headers": headers}, None, send)
        await asyncio.sleep(0.01)

    asyncio.run(ask())
    return int(sent[0]["status"])


def test_the_key_opens_every_route_but_health(exits):
    assert status("/health", "GET", key="wrong") == 299
    assert status("/pause", key="wrong") == status(RESTART_ROUTE, key="wrong") == 401
    assert status("/pause") == 299 and exits == []


def test_a_server_that_is_to_be_started_again_answers_and_ends(exits):
    assert status(RESTART_ROUTE, "GET") == 299 and exits == []
    assert status(RESTART_ROUTE) == 200
    assert exits == [RESTART_EXIT_CODE]
