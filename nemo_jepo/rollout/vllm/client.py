"""One vLLM server over HTTP: a completion, its health, its control routes. Every answer is checked before it is used.

vLLM 0.32's /inference/v1/generate takes token ids and answers with token ids, their log-probs and the versions of the
weights that drew them. Everything here runs on the event loop of `nemo_jepo.rollout.vllm.pool.Pool`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from nemo_jepo.rollout.sampler import GenerationRequest
from nemo_jepo.types import FinishReason
from nemo_jepo.utils.http import JSONServer, ServerFault

HEALTH_TIMEOUT_S = 5.0
_ROUNDING = 1e-3
"""A log-prob may exceed 0 by this much, nats: the sampler's soft-max is rounded."""


class StaleServer(ServerFault):
    """The server sampled with weights that are not those it was last given: it was restarted."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sample as the server drew it."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Nats, of the distribution that was sampled (temperature and truncation included)."""
    finish_reason: FinishReason
    policy_version: int
    """The oldest weights that drew any of the tokens."""


def stop_strings(marker: str) -> tuple[str, ...]:
    """Spellings of the answer marker at which a server stops.

    vLLM compares case by case. A spelling that is not among these is decoded on, and the splice cuts there later: it
    costs tokens, never correctness.
    """
    spellings = (marker, marker.lower(), marker.upper(), marker[0].upper() + marker[1:], marker.title())
    return tuple(dict.fromkeys(spellings))


class VLLMServer(JSONServer):
    """The routes of one server that a run uses.

    Args:
        url: http://HOST:PORT.
        session: with no timeout of its own.
        key: sent as a bearer token with every request.
        vocab_size: token ids are below it.
    """

    def __init__(self, url: str, session: aiohttp.ClientSession, key: str, vocab_size: int) -> None:
        super().__init__(url, session, key)
        self._vocab_size = vocab_size

    async def complete(
        self,
        prompt: Sequence[int],
        request: GenerationRequest,
        stops: Sequence[str],
        oldest_version: int,
        timeout_s: float,
    ) -> Completion:
        """One completion of a prompt.

        Args:
            prompt: token ids.
            request: its num_generations_per_prompt and seed are not read.
            stops: strings after which the completion ends.
            oldest_version: weights that the server has been given before this call.
            timeout_s: seconds for the whole answer.
        Raises:
            ServerFault: no answer, a late one, or one that breaks a rule; StaleServer: older weights than given.
        """
        params: dict[str, Any] = {
            "n": 1,
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k,
            "logprobs": 0,
            "skip_special_tokens": False,
        }
        if stops:
            params |= {"stop": list(stops), "include_stop_str_in_output": True}
        route = "/inference/v1/generate"
        body = {"token_ids": list(prompt), "sampling_params": params, "return_token_ids": True}
        answer = await self.control("POST", route, body, timeout_s=timeout_s)
        try:
            return self._read(answer, prompt, request.max_tokens, oldest_version)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            what = (
                error
                if isinstance(error, _Broken)
                else f"not the answer of vLLM 0.32 ({type(error).__name__}: {error})"
            )
            raise ServerFault(self.url, route, str(what)) from error

    def _read(
        self, answer: Mapping[str, Any], prompt: Sequence[int], max_tokens: int, oldest_version: int
    ) -> Completion:
        """The completion of an answer that keeps every rule; the first broken one is raised."""
        if answer["prompt_token_ids"] != list(prompt):
            raise _Broken("answers another prompt")
        (choice,) = answer["choices"]
        token_ids, content = choice["token_ids"], choice["logprobs"]["content"]
        logprobs = [float(entry["logprob"]) for entry in content]
        if choice["finish_reason"] not in ("stop", "length"):
            raise _Broken(f"ended with {choice['finish_reason']!r}")
        if not 1 <= len(token_ids) <= max_tokens:
            raise _Broken(f"{len(token_ids)} tokens where 1 to {max_tokens} were asked for")
        if [entry["token_id"] for entry in content] != token_ids:
            raise _Broken("the log-probs are of other tokens than the answer's")
        if not all(type(token) is int and 0 <= token < self._vocab_size for token in token_ids):
            raise _Broken(f"a token id is not in [0, {self._vocab_size})")
        if not all(math.isfinite(logprob) and logprob <= _ROUNDING for logprob in logprobs):
            raise _Broken("a log-prob is not finite or is positive")
        version = self._oldest(choice["weight_versions"], oldest_version)
        return Completion(tuple(token_ids), tuple(logprobs), choice["finish_reason"], version)

    def _oldest(self, spans: Sequence[Mapping[str, Any]] | None, oldest_version: int) -> int:
        versions = [str(span["version"]) for span in spans or ()]
        if not versions or not all(version.isdecimal() for version in versions):
            raise StaleServer(self.url, "", f"sampled with weights {versions}, which no sync gave it: it was restarted")
        oldest = min(map(int, versions))
        if oldest < oldest_version:
            what = f"sampled with weights of step {oldest} although it was given those of step {oldest_version}"
            raise StaleServer(self.url, "", what)
        return oldest

    async def health(self) -> None:
        """Returns if the server is well; else ServerFault, within HEALTH_TIMEOUT_S."""
        await self.control("GET", "/health", timeout_s=HEALTH_TIMEOUT_S)


class _Broken(ValueError):
    """A rule that an answer breaks."""
