"""Verdicts on answers that the verifier calls wrong: votes of a language model.

They are metrics of an evaluation, and with objective.reward=hybrid, which nobody gets without asking, a reward.

    verdict = correct   where more than half of the votes say so
              wrong     where more than half of them say that
              None      otherwise: votes are missing, and a missing vote is neither

An LLM judge and a model-based verifier are this class with other settings. Asking goes on no longer than it can matter:
first as many votes as could decide, then those that are still needed.
"""

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp

from nemo_jepo.config.judge import RUN_SERVERS, JudgeConfig
from nemo_jepo.rewards.judge_prompt import Case, JudgePrompt, NoVote, judge_prompt
from nemo_jepo.rewards.verdict_cache import VerdictCache
from nemo_jepo.utils.http import JSONServer, RequestRefused, ServerFault, backoff_s

MAX_LOST_IN_A_ROW = 4
"""An endpoint that does not answer about so many cases, one after the other, is asked no more."""


class _GivenUp(ServerFault):
    """The endpoint is asked no more."""


def open_judge(
    settings: JudgeConfig, node: str, run_servers: tuple[Sequence[str], str] | None, cache: "VerdictCache | None"
) -> "Judge":
    """The judge of some settings.

    Args:
        node: their key.
        run_servers: addresses and key of the run's own vLLM servers, for url=rollout.
        cache: of its verdicts.
    Raises:
        ConfigError: the file of its key is not the owner's alone.
    """
    if settings.url == RUN_SERVERS:
        assert run_servers is not None, "config.check asks for rollout=vllm"
        urls, key = run_servers
        return Judge(settings, [f"{url}/v1" for url in urls], key, cache)
    return Judge(settings, [str(settings.url)], settings.key(node), cache)


class Judge:
    """Asks one model, behind any number of equal servers.

    Args:
        settings: prompt, votes, limits.
        urls: of the servers, up to /v1.
        key: of all of them; None sends none.
        cache: of verdicts; None for none.
    """

    def __init__(self, settings: JudgeConfig, urls: Sequence[str], key: str | None, cache: VerdictCache | None) -> None:
        self.fault: str | None = None
        """The first thing that cost a vote."""
        self._settings, self._urls, self._key, self._cache = settings, urls, key, cache
        self._needed = settings.votes // 2 + 1
        self._lost: set[Case] = set()
        """Cases that the endpoint left without an answer since it last gave one."""

    def judge(self, cases: Sequence[Case]) -> list[bool | None]:
        """Whether each answer is correct; None where there is no verdict. Equal cases are asked once.

        It ends within deadline_s, and raises for nothing that an endpoint may do.
        """
        return asyncio.run(self._judge(cases)) if cases else []

    async def _judge(self, cases: Sequence[Case]) -> list[bool | None]:
        size = self._settings.max_concurrency
        self._slots = asyncio.Semaphore(size)  # requests in flight
        self._places = asyncio.Semaphore(-(-size // self._needed))  # cases in flight: enough to fill the slots
        connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
        verdicts: dict[Case, bool | None] = dict.fromkeys(cases)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            self._servers = [JSONServer(url.rstrip("/"), session, self._key) for url in self._urls]
            try:
                async with asyncio.timeout(self._settings.deadline_s), asyncio.TaskGroup() as group:
                    if model := self._settings.model or await self._first_model():
                        for case in verdicts:
                            group.create_task(self._decide(case, model, verdicts))
            except TimeoutError:
                self._note(f"not done within deadline_s={self._settings.deadline_s:g}")
        return [verdicts[case] for case in cases]

    async def _decide(self, case: Case, model: str, verdicts: dict[Case, bool | None]) -> None:
        """Write the case's verdict, if there is one, into the table."""
        prompt = judge_prompt(case, self._settings)
        key = self._cache_key(prompt, model)
        if self._cache and (known := self._cache.get(key)) is not None:
            verdicts[case] = known
            return
        votes: list[bool | None] = []
        async with self._places:
            while (short := self._needed - max(votes.count(True), votes.count(False))) > 0:
                if len(votes) + short > self._settings.votes:
                    return  # the votes that are left cannot decide
                numbers = range(len(votes), len(votes) + short)
                votes += await asyncio.gather(*(self._vote(case, prompt, model, number) for number in numbers))
        verdicts[case] = correct = votes.count(True) >= self._needed
        if self._cache:
            texts = {"question": case.question, "reference_answer": case.reference_answer, "answer": case.own_answer}
            self._cache.put(key, correct, {"model": model, "votes": votes, **texts})

    async def _vote(self, case: Case, prompt: JudgePrompt, model: str, number: int) -> bool | None:
        """One vote; None where every attempt at it failed."""
        settings, fault = self._settings, ""
        for attempt in range(settings.max_attempts):
            body = {
                "model": model,
                "messages": [{"role": "user", "content": prompt.text}],
                "temperature": settings.temperature,
                "max_tokens": settings.max_tokens,
                "seed": number + settings.votes * attempt,
            } | settings.extra_body
            body = {name: value for name, value in body.items() if value is not None}
            try:
                answer = await self._request(number + attempt, "POST", "/chat/completions", body)
                self._lost.clear()
                return prompt.read(_reply(answer))
            except (RequestRefused, _GivenUp) as final:
                self._note(str(final))
                return None
            except (ServerFault, NoVote) as error:
                fault = str(error)
                answered = isinstance(error, NoVote)
            if attempt + 1 < settings.max_attempts:
                await asyncio.sleep(backoff_s(attempt))
        self._note(fault)
        if not answered:
            self._lost.add(case)
        return None

    async def _first_model(self) -> str | None:
        """The name of the model that the endpoint lists first."""
        try:
            listed = await self._request(0, "GET", "/models")
            return str(listed["data"][0]["id"])
        except ServerFault as fault:
            self._note(str(fault))
        except (KeyError, TypeError, IndexError):
            self._note(f"{self._urls[0]}/models lists no model; name one by the setting model")
        return None

    async def _request(
        self, number: int, method: str, route: str, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        server = self._servers[number % len(self._servers)]
        async with self._slots:
            if len(self._lost) >= MAX_LOST_IN_A_ROW:
                raise _GivenUp(server.url, route, "given up")
            return await server.control(method, route, body, timeout_s=self._settings.timeout_s)

    def _cache_key(self, prompt: JudgePrompt, model: str) -> str:
        """Hash of all that a verdict depends on."""
        asked = self._settings
        request = [asked.votes, asked.temperature, asked.max_tokens, asked.extra_body]
        parts = json.dumps([model, prompt.text, prompt.correct, prompt.wrong, *request], sort_keys=True)
        return hashlib.sha256(parts.encode()).hexdigest()

    def _note(self, fault: str) -> None:
        self.fault = self.fault or fault


def _reply(answer: Mapping[str, Any]) -> str:
    """The text of a chat completion; NoVote where there is none or it was cut off."""
    try:
        (choice,) = answer["choices"]
        text, reason = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise NoVote("the answer is no chat completion") from error
    if not isinstance(text, str):
        raise NoVote("the reply is no text")
    if reason == "length":
        raise NoVote("the reply was cut off; max_tokens may be too small")
    return text
