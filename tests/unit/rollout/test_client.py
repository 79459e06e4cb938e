"""One server's answers: a good one is read, every broken one is refused with the server, the route and the reason."""

import asyncio
from collections.abc import Iterator

import aiohttp
import pytest

from nemo_jepo.rollout.sampler import GenerationRequest
from nemo_jepo.rollout.vllm.client import Completion, StaleServer, VLLMServer, stop_strings
from nemo_jepo.utils.http import NoAnswer, RequestRefused, ServerFault
from tests.support.fake_vllm import KEY, VOCAB, FakeVLLM, changed, good_answer, with_logprobs

REQUEST = GenerationRequest(
    num_generations_per_prompt=4, max_tokens=5, stop_at_marker=True, temperature=0.7, seed=1, top_p=0.9, top_k=11
)


@pytest.fixture
def fake() -> Iterator[FakeVLLM]:
    with FakeVLLM() as server:
        yield server


def complete(
    fake: FakeVLLM, oldest_version: int = 7, key: str = KEY, timeout_s: float = 20, stops: tuple[str, ...] = ()
) -> Completion:
    async def ask() -> Completion:
        async with aiohttp.ClientSession() as session:
            server = VLLMServer(fake.url, session, key, VOCAB)
            return await server.complete((1, 2), REQUEST, stops, oldest_version, timeout_s)

    return asyncio.run(ask())


def test_a_good_answer_is_read_token_by_token(fake):
    assert complete(fake) == Completion((3, 4), (-0.5, -0.25), "stop", 7)


def test_the_request_says_everything_about_the_distribution_and_nothing_about_seeds(fake):
    complete(fake, stops=("end",))
    (body,) = fake.requests
    assert body["token_ids"] == [1, 2]
    expected = {"n": 1, "max_tokens": 5, "temperature": 0.7, "top_p": 0.9, "top_k": 11, "logprobs": 0}
    expected |= {"stop": ["end"], "include_stop_str_in_output": True, "skip_special_tokens": False}
    assert body["sampling_params"] == expected


def test_the_oldest_weights_of_a_completion_are_its_version(fake):
    spans = [{"version": "8", "start": 0, "end": 1}, {"version": "10", "start": 1, "end": 2}]
    fake.answer = changed(weight_versions=spans)
    assert complete(fake).policy_version == 8


BROKEN = {
    "garbage": lambda request: b"\x00\xffnonsense",
    "truncated JSON": lambda request: b'{"choices": [{"token_ids": [3, ',
    "deep nesting": lambda request: b"[" * 100_000,
    "a list": lambda request: b"[]",
    "an empty answer": lambda request: b"",
    "an empty object": lambda request: {},
    "null": lambda request: b"null",
    "two choices": lambda request: {**good_answer(request), "choices": good_answer(request)["choices"] * 2},
    "another prompt": lambda request: {**good_answer(request), "prompt_token_ids": [9]},
    "an id outside the vocabulary": changed(
        token_ids=[3, VOCAB], logprobs={"content": [{"token_id": 3, "logprob": -1}, {"token_id": VOCAB, "logprob": -1}]}
    ),
    "a negative id": changed(token_ids=[-1], logprobs={"content": [{"token_id": -1, "logprob": -1}]}),
    "an id that is no integer": changed(token_ids=[3.5], logprobs={"content": [{"token_id": 3.5, "logprob": -1}]}),
    "text for ids": changed(token_ids="34"),
    "no tokens": changed(token_ids=[], logprobs={"content": []}),
    "more tokens than asked for": with_logprobs(*[-1.0] * 6),
    "fewer log-probs than tokens": changed(token_ids=[3, 4, 5]),
    "log-probs of other tokens": changed(token_ids=[4, 3]),
    "no log-probs": changed(logprobs=None),
    "NaN": with_logprobs(-1.0, float("nan")),
    "minus infinity": with_logprobs(-float("inf")),
    "a positive log-prob": with_logprobs(-1.0, 0.5),
    "null for a log-prob": changed(token_ids=[3], logprobs={"content": [{"token_id": 3, "logprob": None}]}),
    "an abort": changed(finish_reason="abort"),
    "no end": changed(finish_reason=None),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_an_answer_that_breaks_a_rule_is_a_fault_that_names_server_and_route(fault, fake):
    fake.answer = BROKEN[fault]
    with pytest.raises(ServerFault) as caught:
        complete(fake)
    assert str(caught.value).startswith(f"{fake.url}/inference/v1/generate: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert not isinstance(caught.value, StaleServer | RequestRefused)


@pytest.mark.parametrize("versions", [None, [], [{"version": "default", "start": 0, "end": 2}]])
def test_weights_that_no_sync_gave_are_a_restarted_server(versions, fake):
    fake.answer = changed(weight_versions=versions)
    with pytest.raises(StaleServer, match="restarted"):
        complete(fake)


def test_older_weights_than_the_server_was_given_are_stale(fake):
    with pytest.raises(StaleServer, match="step 7 although it was given those of step 8"):
        complete(fake, oldest_version=8)


def test_a_server_that_hangs_is_a_fault_when_the_time_is_over(fake):
    fake.hangs = True
    with pytest.raises(NoAnswer, match="no answer within 0.2 s"):
        complete(fake, timeout_s=0.2)


def test_a_connection_that_breaks_in_the_answer_is_a_fault(fake):
    fake.closes = True
    with pytest.raises(ServerFault, match="generate: Client"):
        complete(fake)


def test_nobody_listening_is_a_fault(fake):
    fake.die()
    with pytest.raises(ServerFault, match="generate: ClientConnector"):
        complete(fake)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(500, ServerFault), (503, ServerFault), (404, ServerFault), (400, RequestRefused), (422, RequestRefused)],
)
def test_a_bad_status_is_a_fault_of_the_server_or_a_refusal_of_the_request(status, kind, fake):
    fake.status = status
    with pytest.raises(ServerFault, match=f"status {status}: ") as caught:
        complete(fake)
    assert type(caught.value) is kind


def test_a_wrong_key_is_a_fault(fake):
    with pytest.raises(ServerFault, match="status 401"):
        complete(fake, key="wrong")


def test_a_marker_stops_in_the_spellings_that_models_write():
    assert stop_strings("the final answer is") == (
        "the final answer is",
        "THE FINAL ANSWER IS",
        "The final answer is",
        "The Final Answer Is",
    )
    assert stop_strings("e") == ("e", "E")
