"""A judge as far as the program can tell: an OpenAI-compatible endpoint that votes as it is told."""

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

from aiohttp import web

from tests.support.loopback import LoopbackServer

Body = dict[str, Any]


def prompt_of(body: Body) -> str:
    (message,) = body["messages"]
    return message["content"]


def verdict_lines(body: Body) -> tuple[str, str]:
    """The lines for correct and wrong, which are the last two of the default prompts."""
    correct, wrong = prompt_of(body).strip().splitlines()[-2:]
    return correct, wrong


def says(verdict: bool) -> Callable[[Body], str]:
    """A reply with some reasoning and this vote."""
    return lambda body: f"They are compared.\n\n{verdict_lines(body)[0 if verdict else 1]}\n"


def votes(*order: bool | None) -> Callable[[Body], str]:
    """The nth vote of a case, by its seed; None never votes, however often it is asked."""

    def reply(body: Body) -> str:
        vote = order[body["seed"] % len(order)]
        return "I cannot say." if vote is None else says(vote)(body)

    return reply


def scores(score_of: Callable[[str], float | None]) -> Callable[[Body], str]:
    """A reply with this score of the own answer, in the default prompt's words; None is no score."""

    def reply(body: Body) -> str:
        lines = prompt_of(body).strip().splitlines()
        start = next(number for number, line in enumerate(lines) if line.endswith("answer to score")) + 1
        end = max(number for number, line in enumerate(lines) if line.startswith("===") and line.endswith("end"))
        score = score_of("\n".join(lines[start:end]))
        return "I cannot say." if score is None else f"It is compared.\n\n{lines[-1].replace('SCORE', f'{score:g}')}\n"

    return reply


def completion(text: object, finish_reason: str = "stop") -> Body:
    message = {"role": "assistant", "content": text}
    return {"object": "chat.completion", "choices": [{"message": message, "finish_reason": finish_reason}]}


class FakeJudge(LoopbackServer):
    """Its attributes may be changed while it runs."""

    def __init__(self, reply: Callable[[Body], str | Body | bytes] | None = None) -> None:
        super().__init__()
        self.reply = reply or says(True)
        """A reply's text, a whole answer, or its bytes."""
        self.status: Callable[[Body], int] = lambda body: 200
        self.hangs: Callable[[Body], bool] = lambda body: False
        self.key: str | None = None
        self.models: object = {"object": "list", "data": [{"id": "listed"}]}
        self.reply_s = 0.0
        self.requests: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.running = self.most_running = 0

    @property
    def base(self) -> str:
        return f"{self.url}/v1"

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/v1/chat/completions", self._chat), web.get("/v1/models", self._models)]

    def about(self, answer: str) -> Sequence[Body]:
        """The requests whose prompt holds this line."""
        return [body for body in self.requests if answer in prompt_of(body).splitlines()]

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response(self.models)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.Response(status=401)
        body = await request.json()
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(3600 if self.hangs(body) else self.reply_s)
        finally:
            self.running -= 1
        reply = self.reply(body)
        if isinstance(reply, str):
            reply = completion(reply)
        raw = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        return web.Response(status=self.status(body), body=raw, content_type="application/json")
