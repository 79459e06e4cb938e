"""The judge over real HTTP: majorities, missing votes, and endpoints that fail in every way."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import pytest

from nemo_jepo.config.judge import JudgeConfig
from nemo_jepo.rewards.judge import Judge
from nemo_jepo.rewards.judge_prompt import Case
from nemo_jepo.utils import http
from nemo_jepo.utils.network import free_ports
from tests.support.fake_judge import FakeJudge, completion, prompt_of, says, verdict_lines, votes

CASE = Case("What is 2+2?", "4", "four")
SETTINGS = JudgeConfig(model="m", timeout_s=10, deadline_s=30, max_attempts=2)


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch):
    monkeypatch.setattr(http, "FIRST_BACKOFF_S", 0.001)


@pytest.fixture
def fake() -> Iterator[FakeJudge]:
    with FakeJudge() as server:
        yield server


def cases(count: int) -> list[Case]:
    return [Case("q", "4", f"answer {number}") for number in range(count)]


def judge_of(fake: FakeJudge, **changes: Any) -> Judge:
    return Judge(dataclasses.replace(SETTINGS, **changes), [fake.base], None, None)


# Majorities.

T, F = True, False


@pytest.mark.parametrize(
    ("order", "verdict", "num_requests"),
    [
        ((T, T, T, F, F), True, 3),
        ((F, F, F, T, T), False, 3),
        ((T, F, T, T, F), True, 4),
        ((T, F, T, F, F), False, 5),
        ((F, T, F, T, T), True, 5),
    ],
)
def test_most_of_five_votes_decide_and_no_vote_is_asked_for_that_cannot_matter(fake, order, verdict, num_requests):
    fake.reply = votes(*order)
    judge = judge_of(fake)
    assert judge.judge([CASE]) == [verdict]
    assert judge.fault is None
    assert sorted(body["seed"] for body in fake.requests) == list(range(num_requests))


@pytest.mark.parametrize(
    ("order", "verdict"),
    [
        ((T, T, None, None, T), True),
        ((None, F, F, F, None), False),
        ((T, T, F, F, None), None),
        ((T, T, None, None, None), None),
        ((None, None, None, F, F), None),
        ((None,) * 5, None),
    ],
)
def test_a_missing_vote_is_on_neither_side(fake, order, verdict):
    """Three of five decide, whatever is missing; a tie of those that came does not."""
    fake.reply = votes(*order)
    judge = judge_of(fake)
    assert judge.judge([CASE]) == [verdict]
    assert "does not end with a verdict line" in judge.fault


def test_one_vote_is_a_majority_of_one(fake):
    fake.reply = says(False)
    assert judge_of(fake, votes=1).judge([CASE]) == [False]
    assert len(fake.requests) == 1


def test_a_vote_that_failed_is_asked_for_again_with_another_seed(fake):
    fake.status = lambda body: 503 if body["seed"] < 5 else 200
    judge = judge_of(fake)
    assert judge.judge([CASE]) == [True]
    assert sorted(body["seed"] for body in fake.requests) == [0, 1, 2, 5, 6, 7]
    assert judge.fault is None


def test_each_case_has_its_own_verdict_and_equal_ones_are_asked_once(fake):
    fake.reply = lambda body: says("answer 1" in prompt_of(body))(body)
    asked = [*cases(3), *cases(3)]
    assert judge_of(fake).judge(asked) == [False, True, False] * 2
    assert len(fake.requests) == 9
    assert judge_of(fake).judge([]) == []


# What is sent.


def test_a_request_says_what_the_settings_say(fake):
    settings = dict(votes=1, temperature=0.25, max_tokens=77, extra_body={"top_p": 0.9, "seed": None})
    fake.reply = lambda body: f"{verdict_lines(body)[0]}"
    judge_of(fake, **settings).judge([CASE])
    (body,) = fake.requests
    text = prompt_of(body)
    assert [text.splitlines().count(line) for line in ("What is 2+2?", "4", "four")] == [1, 1, 1]
    del body["messages"]
    assert body == {"model": "m", "temperature": 0.25, "max_tokens": 77, "top_p": 0.9}


def test_the_key_goes_to_the_endpoint_and_without_one_no_header_does(fake):
    judge_of(fake).judge([CASE])
    assert "Authorization" not in fake.headers[-1]
    fake.key = "secret"
    assert Judge(SETTINGS, [fake.base], "secret", None).judge([CASE]) == [True]
    refused = Judge(SETTINGS, [fake.base], "other", None)
    assert refused.judge([CASE]) == [None]
    assert "status 401" in refused.fault


def test_without_a_name_the_first_listed_model_is_asked(fake):
    assert judge_of(fake, model=None).judge([CASE]) == [True]
    assert {body["model"] for body in fake.requests} == {"listed"}
    fake.models = {"data": []}
    judge = judge_of(fake, model=None)
    assert judge.judge([CASE]) == [None]
    assert judge.fault.endswith("/models lists no model; name one by the setting model")


def test_no_more_requests_are_in_flight_than_allowed(fake):
    fake.reply_s = 0.02
    assert judge_of(fake, max_concurrency=3).judge(cases(8)) == [True] * 8
    assert fake.most_running == 3


# Faults: never an exception, never a verdict.


def other_verdict(body: dict[str, Any]) -> str:
    return "Verdict 00000000: correct"


BROKEN = {
    "garbage": (lambda body: b"\x00\xffnonsense", "not JSON"),
    "truncated": (lambda body: b'{"choices": [', "not JSON"),
    "deep nesting": (lambda body: b"[" * 100_000, "not JSON"),
    "a list": (lambda body: b"[]", "not a JSON object"),
    "nothing": (lambda body: b"", "no chat completion"),
    "an error as 200": (lambda body: {"error": "busy"}, "no chat completion"),
    "no choices": (lambda body: {"choices": []}, "no chat completion"),
    "choices of another kind": (lambda body: {"choices": [3]}, "no chat completion"),
    "a choice that is null": (lambda body: {"choices": [None]}, "no chat completion"),
    "two choices": (lambda body: {"choices": completion("x")["choices"] * 2}, "no chat completion"),
    "null": (lambda body: completion(None), "no text"),
    "NaN": (lambda body: completion(float("nan")), "no text"),
    "a number": (lambda body: completion(1), "no text"),
    "true": (lambda body: completion(True), "no text"),
    "an empty reply": (lambda body: "", "does not end with a verdict line"),
    "a bare word": (lambda body: "correct", "does not end with a verdict line"),
    "another code": (other_verdict, "does not end with a verdict line"),
    "a verdict inside a sentence": (lambda body: f"I say {verdict_lines(body)[0]}", "does not end"),
    "a verdict that is not last": (lambda body: f"{verdict_lines(body)[0]}\nOr not.", "does not end"),
    "both verdicts": (lambda body: "\n".join(verdict_lines(body)), "both verdicts"),
    "the prompt again": (prompt_of, "both verdicts"),
    "a reply that was cut off": (lambda body: completion(verdict_lines(body)[0], "length"), "cut off"),
}


@pytest.mark.parametrize("reply", [pytest.param(value, id=name) for name, value in BROKEN.items()])
def test_a_broken_reply_is_no_vote(fake, reply):
    fake.reply, fault = reply
    judge = judge_of(fake)
    assert judge.judge([CASE]) == [None]
    assert fault in judge.fault


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 413, 422, 429, 500, 502, 503])
def test_a_status_other_than_200_is_no_vote_even_with_a_good_reply(fake, status):
    fake.status = lambda body: status
    judge = judge_of(fake)
    assert judge.judge([CASE]) == [None]
    assert f"/chat/completions: status {status}" in judge.fault


def test_what_the_endpoint_refuses_is_not_asked_again_and_costs_no_other_case(fake):
    fake.status = lambda body: 400 if "answer 9\n" not in prompt_of(body) else 200
    assert judge_of(fake, max_concurrency=1).judge(cases(10)) == [None] * 9 + [True]
    assert len(fake.requests) == 9 * 3 + 3


def test_a_case_that_the_endpoint_fails_at_costs_no_other_case(fake):
    fake.status = lambda body: 500 if "answer 0\n" in prompt_of(body) else 200
    assert judge_of(fake, max_concurrency=1).judge(cases(10)) == [None] + [True] * 9


def test_a_hanging_endpoint_is_a_fault_after_timeout_s(fake):
    fake.hangs = lambda body: True
    judge = judge_of(fake, timeout_s=0.1)
    assert judge.judge([CASE]) == [None]
    assert judge.fault == f"{fake.base}/chat/completions: no answer within 0.1 s"


def test_the_deadline_ends_it_and_keeps_the_verdicts_that_are_there(fake):
    fake.hangs = lambda body: "answer 0\n" in prompt_of(body)
    began_s = time.monotonic()
    judge = judge_of(fake, timeout_s=1000, deadline_s=5)
    assert judge.judge(cases(4)) == [None, True, True, True]
    assert judge.fault == "not done within deadline_s=5"
    assert time.monotonic() - began_s < 100  # far from timeout_s


def test_an_endpoint_that_is_down_is_given_up(fake):
    """Each lost case costs at most 5 votes of 2 attempts, and after 4 lost cases nobody asks."""
    fake.status = lambda body: 502
    judge = judge_of(fake, max_concurrency=1)
    assert judge.judge(cases(200)) == [None] * 200
    assert len(fake.requests) <= 4 * 5 * 2
    assert "status 502" in judge.fault


def test_nobody_listening_is_a_fault():
    (port,) = free_ports(1)
    judge = Judge(SETTINGS, [f"http://127.0.0.1:{port}/v1"], None, None)
    assert judge.judge(cases(20)) == [None] * 20
    assert "ClientConnectorError" in judge.fault
    nameless = Judge(dataclasses.replace(SETTINGS, model=None), [f"http://127.0.0.1:{port}/v1"], None, None)
    assert nameless.judge(cases(2)) == [None] * 2
    assert "/models: ClientConnectorError" in nameless.fault


def test_an_endless_answer_is_cut_off(fake, monkeypatch):
    monkeypatch.setattr(http, "MAX_ANSWER_BYTES", 2**20)
    fake.reply = lambda body: b" " * 2**21
    judge = judge_of(fake, votes=1)
    assert judge.judge([CASE]) == [None]
    assert judge.fault.endswith("an answer of more than 1 MiB")


def test_of_two_servers_the_living_one_answers_for_both(fake):
    (port,) = free_ports(1)
    judge = Judge(SETTINGS, [f"http://127.0.0.1:{port}/v1", f"{fake.base}/"], None, None)
    assert judge.judge(cases(6)) == [True] * 6
