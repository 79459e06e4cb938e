"""A vLLM server as far as the pool can tell: real HTTP, answers of the right form, faults that can be switched on."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

from aiohttp import web

from tests.support.loopback import LoopbackServer

KEY = "secret"
VOCAB = 50
Body = dict[str, Any]


def good_answer(request: Body, version: str = "7") -> Body:
    """Two tokens, as vLLM 0.32 answers /inference/v1/generate."""
    content = [{"token_id": 3, "logprob": -0.5}, {"token_id": 4, "logprob": -0.25}]
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "token_ids": [3, 4],
        "logprobs": {"content": content},
        "weight_versions": [{"version": version, "start": 0, "end": 2}],
    }
    return {"prompt_token_ids": request["token_ids"], "choices": [choice]}


def changed(**fields: Any) -> Callable[[Body], Body]:
    """A good answer with other fields in its choice."""

    def answer(request: Body) -> Body:
        good = good_answer(request)
        good["choices"][0] |= fields
        return good

    return answer


def with_logprobs(*logprobs: float) -> Callable[[Body], Body]:
    return changed(
        token_ids=[3] * len(logprobs),
        logprobs={"content": [{"token_id": 3, "logprob": logprob} for logprob in logprobs]},
    )


class FakeVLLM(LoopbackServer):
    """Its attributes may be changed while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.answer: Callable[[Body], Body | bytes] = good_answer
        self.status = 200
        self.generate_s = 0.0
        self.hangs = False
        self.closes = False
        self.health = 200
        self.requests: list[Body] = []
        self.running = self.most_running = 0

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/inference/v1/generate", self._generate),
            web.get("/health", self._health),
            web.get("/weight_info", self._weight_info),
        ]

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return web.Response(status=401)
        body = await request.json()
        self.requests.append(body)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(self.generate_s)
            while self.hangs:
                await asyncio.sleep(0.01)
        finally:
            self.running -= 1
        answer = self.answer(body)
        raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        if self.closes:
            response = web.StreamResponse(headers={"Content-Length": str(len(raw) + 100)})
            await response.prepare(request)
            await response.write(raw)
            assert request.transport is not None
            request.transport.close()
            return response
        return web.Response(status=self.status, body=raw, content_type="application/json")

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=self.health)

    async def _weight_info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": "7"})
