"""Verdicts on own answers: votes of a language model.

They are metrics of an evaluation, and with objective.reward=hybrid, which nobody gets without asking, a reward.

    verdict = correct   where more than half of the votes say so
              wrong     where more than half of them say that
              None      otherwise: votes are missing, and a missing vote is neither

An LLM judge and a model-based verifier are this class with other settings. Asking goes on no longer than it can matter:
first as many votes as could decide, then those that are still needed. A score is a vote of one that says a number.
"""

import asyncio
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Generic

import aiohttp

from nemo_jepo.config.judge import RUN_SERVERS, EndpointConfig, JudgeConfig, ScoreJudgeConfig
from nemo_jepo.rewards.judge_prompt import Case, CasePrompt, NoVote, Verdict, judge_prompt, score_prompt
from nemo_jepo.rewards.verdict_cache import VerdictCache, open_cache
from nemo_jepo.utils.http import JSONServer, RequestRefused, ServerFault, backoff_s

log = logging.getLogger(__name__)

RunServers = tuple[Sequence[str], str] | None
"""Addresses and key of the run's own vLLM servers, for url=rollout."""
MAX_LOST_IN_A_ROW = 4
"""An endpoint that does not answer about so many cases, one after the other, is asked no more."""


class _GivenUp(ServerFault):
    """The endpoint is asked no more."""


def open_judge(settings: JudgeConfig, node: str, run_servers: RunServers, cache: VerdictCache[bool] | None) -> "Judge":
    """The judge of some settings.

    Args:
        node: their key.
        cache: of its verdicts.
    Raises:
        ConfigError: the file of its key is not the owner's alone.
    """
    return Judge(settings, *_servers(settings, node, run_servers), cache)


def open_score_judge(
    settings: ScoreJudgeConfig, node: str, run_servers: RunServers, cache: VerdictCache[float] | None
) -> "ScoreJudge":
    """The same of one that scores."""
    return ScoreJudge(settings, *_servers(settings, node, run_servers), cache)


def _servers(settings: EndpointConfig, node: str, run_servers: RunServers) -> tuple[list[str], str | None]:
    """Addresses up to /v1, and their key."""
    if settings.url == RUN_SERVERS:
        assert run_servers is not None, "config.check asks for rollout=vllm"
        urls, key = run_servers
        return [f"{url}/v1" for url in urls], key
    return [str(settings.url)], settings.key(node)


class AskedModel(Generic[Verdict]):
    """Asks one model, behind any number of equal servers, what its prompts read from replies.

    Args:
        settings: limits and sampling.
        urls: of the servers, up to /v1.
        key: of all of them; None sends none.
        cache: of verdicts; None for none.
        prompt_for: what is asked about a case.
        votes: for one case; more than half of them must agree.
    """

    def __init__(
        self,
        settings: EndpointConfig,
        urls: Sequence[str],
        key: str | None,
        cache: VerdictCache[Verdict] | None,
        prompt_for: Callable[[Case], CasePrompt[Verdict]],
        votes: int,
    ) -> None:
        self.fault: str | None = None
        """The first thing that cost a vote."""
        self._settings, self._urls, self._key, self._cache = settings, urls, key, cache
        self._prompt_for, self._votes, self._needed = prompt_for, votes, votes // 2 + 1
        self._lost: set[Case] = set()
        """Cases that the endpoint left without an answer since it last gave one."""

    def judge(self, cases: Sequence[Case]) -> list[Verdict | None]:
        """The verdict on each answer; None where there is none. Equal cases are asked once.

        It ends within deadline_s, and raises for nothing that an endpoint may do.
        """
        return asyncio.run(self._judge(cases)) if cases else []

    async def _judge(self, cases: Sequence[Case]) -> list[Verdict | None]:
        size = self._settings.max_concurrency
        self._slots = asyncio.Semaphore(size)  # requests in flight
        self._places = asyncio.Semaphore(-(-size // self._needed))  # cases in flight: enough to fill the slots
        connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
        verdicts: dict[Case, Verdict | None] = dict.fromkeys(cases)
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

    async def _decide(self, case: Case, model: str, verdicts: dict[Case, Verdict | None]) -> None:
        """Write the case's verdict, if there is one, into the table."""
        prompt = self._prompt_for(case)
        key = self._cache_key(prompt, model)
        if self._cache and (known := self._cache.get(key)) is not None:
            verdicts[case] = known
            return
        votes: list[Verdict | None] = []
        async with self._places:
            while (short := self._needed - _most(votes)[1]) > 0:
                if len(votes) + short > self._votes:
                    return  # the votes that are left cannot decide
                numbers = range(len(votes), len(votes) + short)
                votes += await asyncio.gather(*(self._vote(case, prompt, model, number) for number in numbers))
        verdicts[case] = verdict = _most(votes)[0]
        if self._cache and verdict is not None:
            texts = {"question": case.question, "reference_answer": case.reference_answer, "answer": case.own_answer}
            self._cache.put(key, verdict, {"model": model, "votes": votes, **texts})

    async def _vote(self, case: Case, prompt: CasePrompt[Verdict], model: str, number: int) -> Verdict | None:
        """One vote; None where every attempt at it failed."""
        settings, fault = self._settings, ""
        for attempt in range(settings.max_attempts):
            body = {
                "model": model,
                "messages": [{"role": "user", "content": prompt.text}],
                "temperature": settings.temperature,
                "max_tokens": settings.max_tokens,
                "seed": number + self._votes * attempt,
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

    def _cache_key(self, prompt: CasePrompt[Verdict], model: str) -> str:
        """Hash of all that a verdict depends on."""
        asked = self._settings
        request = [self._votes, asked.temperature, asked.max_tokens, asked.extra_body]
        parts = json.dumps([model, prompt.text, *prompt.lines, *request], sort_keys=True)
        return hashlib.sha256(parts.encode()).hexdigest()

    def _note(self, fault: str) -> None:
        self.fault = self.fault or fault


class Judge(AskedModel[bool]):
    """Says whether an answer is correct, by the votes of its settings; arguments as `AskedModel`."""

    def __init__(
        self, settings: JudgeConfig, urls: Sequence[str], key: str | None, cache: VerdictCache[bool] | None
    ) -> None:
        super().__init__(settings, urls, key, cache, partial(judge_prompt, settings=settings), settings.votes)


class ScoreJudge(AskedModel[float]):
    """Gives an answer a score from 0 to 10; arguments as `AskedModel`."""

    def __init__(
        self, settings: ScoreJudgeConfig, urls: Sequence[str], key: str | None, cache: VerdictCache[float] | None
    ) -> None:
        super().__init__(settings, urls, key, cache, partial(score_prompt, settings=settings), votes=1)


class RewardModel(Generic[Verdict]):
    """A model that training steps ask, opened anew by each; why something is missing is a line of the log, until it is
    another reason. Only who asks, a replica's first rank, opens the cache.

    Args:
        node: the key of its settings.
        open_model: it, for one step, with a cache.
        open_cache: for all of them.
        missing: what an answer lacks after a fault.
    """

    def __init__(
        self,
        node: str,
        open_model: Callable[[VerdictCache[Verdict] | None], AskedModel[Verdict]],
        open_cache: Callable[[], VerdictCache[Verdict] | None],
        missing: str,
    ) -> None:
        self._node, self._open, self._open_cache, self._missing = node, open_model, open_cache, missing
        self._last_fault: str | None = None

    @cached_property
    def _cache(self) -> VerdictCache[Verdict] | None:
        return self._open_cache()

    def ask(self, cases: Sequence[Case]) -> list[Verdict | None]:
        """The model's verdicts, None after a fault."""
        try:
            model = self._open(self._cache)
            verdicts, fault = model.judge(cases), model.fault
        except (ValueError, OSError) as error:  # the file of its key is gone since the run began
            verdicts, fault = [None] * len(cases), str(error)
        missing = verdicts.count(None)
        if missing and fault != self._last_fault:
            self._last_fault = fault
            log.warning("%s: %d of %d answers have no %s: %s", self._node, missing, len(cases), self._missing, fault)
        return verdicts


def verifying_model(settings: JudgeConfig, node: str, run_servers: RunServers, folder: Path) -> RewardModel[bool]:
    """One that says whether answers are correct.

    Args:
        node: the key of its settings.
        run_servers: for settings that share them.
        folder: what its `cache` is relative to.
    """
    cache = partial(open_cache, settings, folder, "correct", bool)
    return RewardModel(node, partial(open_judge, settings, node, run_servers), cache, "verdict")


def scoring_model(settings: ScoreJudgeConfig, node: str, run_servers: RunServers, folder: Path) -> RewardModel[float]:
    """The same, of one that scores them."""
    cache = partial(open_cache, settings, folder, "score", float)
    return RewardModel(node, partial(open_score_judge, settings, node, run_servers), cache, "score")


def _most(votes: Sequence[Verdict | None]) -> tuple[Verdict | None, int]:
    """What most votes say, and how many."""
    counts = Counter(vote for vote in votes if vote is not None)
    return counts.most_common(1)[0] if counts else (None, 0)


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
