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
    """Its attributes may be changed while it runs.

    It sleeps as vLLM 0.32 does: what a request needs and is asleep is a fault here, where vLLM would hang or crash.
    """

    def __init__(self) -> None:
        super().__init__()
        self.answer: Callable[[Body], Body | bytes] = good_answer
        self.status = 200
        self.generate_s = 0.0
        self.hangs = False
        self.closes = False
        self.health = 200
        self.requests: list[Body] = []
        self.control_ports: list[int] = []
        """Of the connections that asked /weight_info."""
        self.running = self.most_running = 0
        self.version = "7"
        self.engine_hangs = False
        """What the engine would have to answer is not answered; /health is."""
        self.asleep: set[str] = set()
        """Of weights and kv_cache."""
        self.refused: set[str] = set()
        """Routes that answer 500, as "/wake_up?tags=weights"."""
        self.log: list[str] = []
        """What it was asked that changes it, in order."""

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/inference/v1/generate", self._generate),
            web.get("/health", self._health),
            web.get("/weight_info", self._weight_info),
            web.get("/is_sleeping", self._is_sleeping),
            web.post("/sleep", self._sleep),
            web.post("/wake_up", self._wake_up),
            web.post("/update_weight_version", self._update_weight_version),
            web.post("/collective_rpc", self._collective_rpc),
            web.post("/nemo_jepo/restart", self._done),
            *(web.post(f"/{route}", self._done) for route in ("pause", "resume", "reset_prefix_cache")),
        ]

    def _answer(self, request: web.Request, need: set[str] | None = None, **answer: Any) -> web.Response:
        """What a control route answers where nothing that it needs is asleep; the request goes into the log."""
        route = request.path_qs.removeprefix("/")
        self.log.append(route)
        if request.path_qs in self.refused or self.asleep & (need or set()):
            return web.Response(status=500, text=f"{route}, asleep: {sorted(self.asleep)}")
        return web.json_response(answer)

    async def _done(self, request: web.Request) -> web.Response:
        return self._answer(request, success=True)

    async def _is_sleeping(self, request: web.Request) -> web.Response:
        return web.json_response({"is_sleeping": bool(self.asleep)})

    async def _sleep(self, request: web.Request) -> web.Response:
        answer = self._answer(request, status="sleeping")
        if answer.status == 200:
            self.asleep = {"weights", "kv_cache"}
        return answer

    async def _wake_up(self, request: web.Request) -> web.Response:
        tags = set(request.query.getall("tags"))
        left = self.asleep - tags
        answer = self._answer(request, status="sleeping" if left else "awake", tags=sorted(tags))
        if answer.status == 200:
            self.asleep = left
        return answer

    async def _update_weight_version(self, request: web.Request) -> web.Response:
        self.version = (await request.json())["new_version"]
        return web.json_response({"success": True})

    async def _collective_rpc(self, request: web.Request) -> web.Response:
        """Weights from files: into memory that must be there."""
        return self._answer(request, need={"weights"})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return web.Response(status=401)
        body = await request.json()
        self.requests.append(body)
        self.log.append("generate")
        if self.asleep:
            return web.Response(status=500, text="generate, asleep")
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
        assert request.transport is not None
        self.control_ports.append(request.transport.get_extra_info("peername")[1])
        while self.engine_hangs:
            await asyncio.sleep(0.01)
        return web.json_response({"weight_version": self.version})
