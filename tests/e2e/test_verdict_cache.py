"""Verdicts on disk: what is there is not asked for again, and nothing torn or foreign is taken for a verdict."""

import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_jepo.config.judge import JudgeConfig
from nemo_jepo.rewards.judge import Judge
from nemo_jepo.rewards.judge_prompt import Case
from nemo_jepo.rewards.verdict_cache import VerdictCache
from tests.support.command_line import ENVIRONMENT
from tests.support.fake_judge import FakeJudge, prompt_of, says, votes

pytestmark = pytest.mark.quick


CASE = Case("What is 2+2?", "4", "four")
SETTINGS = JudgeConfig(model="m", max_attempts=1)


@pytest.fixture
def fake() -> Iterator[FakeJudge]:
    with FakeJudge() as server:
        yield server


def verdict(url: str, file: Path, case: Case = CASE, **changes: Any) -> bool | None:
    """The verdict of a new judge over the file."""
    (one,) = Judge(dataclasses.replace(SETTINGS, **changes), [url], None, VerdictCache(file, "correct", bool)).judge(
        [case]
    )
    return one


@pytest.mark.parametrize("known", [True, False])
def test_a_known_verdict_makes_no_request(fake, tmp_path, known):
    file = tmp_path / "new" / "verdicts.jsonl"
    fake.reply = says(known)
    assert verdict(fake.base, file) is known
    fake.requests.clear()
    fake.reply = says(not known)
    assert verdict(fake.base, file) is known
    assert fake.requests == []
    fake.die()
    assert verdict(fake.base, file) is known


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "other"},
        {"votes": 3},
        {"temperature": 0.1},
        {"max_tokens": 5},
        {"extra_body": {"top_p": 0.5}},
        {"prompt": SETTINGS.prompt + "\n{correct}\n{wrong}"},
        {"case": dataclasses.replace(CASE, question="What is 3+1?")},
        {"case": dataclasses.replace(CASE, reference_answer="4.0")},
        {"case": dataclasses.replace(CASE, own_answer="Four")},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_whatever_may_change_a_verdict_asks_again(fake, tmp_path, changes):
    verdict(fake.base, tmp_path / "verdicts.jsonl")
    fake.reply = says(False)
    assert verdict(fake.base, tmp_path / "verdicts.jsonl", **changes) is False


def test_a_line_says_what_was_judged_and_how_the_votes_fell(fake, tmp_path):
    fake.reply = votes(True, False, True, True, False)
    verdict(fake.base, tmp_path / "verdicts.jsonl")
    (line,) = (tmp_path / "verdicts.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert entry.pop("key")
    assert entry == {
        "correct": True,
        "model": "m",
        "votes": [True, False, True, True],
        "question": "What is 2+2?",
        "reference_answer": "4",
        "answer": "four",
    }


def test_no_verdict_is_not_kept(fake, tmp_path):
    fake.reply = votes(True, True, False, False, None)
    assert verdict(fake.base, tmp_path / "verdicts.jsonl") is None
    assert not (tmp_path / "verdicts.jsonl").exists()
    fake.reply = says(True)
    assert verdict(fake.base, tmp_path / "verdicts.jsonl") is True


def test_a_torn_line_is_skipped_and_the_next_one_is_whole(tmp_path):
    """Every length to which a kill can cut the last line."""
    file = tmp_path / "verdicts.jsonl"
    VerdictCache(file, "correct", bool).put("a", True, {})
    VerdictCache(file, "correct", bool).put("b", False, {"answer": "x"})
    whole = file.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole) - 1):
        file.write_bytes(whole[:cut])
        torn = VerdictCache(file, "correct", bool)
        assert (torn.get("a"), torn.get("b")) == (True, None)
        torn.put("c", True, {})
        after = VerdictCache(file, "correct", bool)
        assert [after.get(key) for key in "abc"] == [True, None, True]


@pytest.mark.parametrize(
    "line",
    [
        b"\x00\xff\xfe",
        b"[]",
        b"3",
        b"null",
        b'{"key": "a"}',
        b'{"key": 1, "correct": true}',
        b'{"key": "a", "correct": "true"}',
        b'{"key": "a", "correct": 1}',
        b'{"key": "a", "correct": NaN}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_verdict_is_skipped(tmp_path, line):
    file = tmp_path / "verdicts.jsonl"
    file.write_bytes(line + b"\n" + b'{"key": "b", "correct": false}\n')
    cache = VerdictCache(file, "correct", bool)
    assert (cache.get("a"), cache.get("b")) == (None, False)


WRITER = """
import sys
from pathlib import Path
from nemo_jepo.rewards.verdict_cache import VerdictCache
cache = VerdictCache(Path(sys.argv[1]), "correct", bool)
print("ready", flush=True)
for number in range(int(sys.argv[3])):
    cache.put(f"{sys.argv[2]} {number}", True, {"answer": "x" * 5000})
    print(number, flush=True)
"""


def writer(file: Path, name: str, count: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", WRITER, str(file), name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)


def test_after_kill_9_every_verdict_that_was_kept_is_there(tmp_path):
    file = tmp_path / "verdicts.jsonl"
    process = writer(file, "killed", 10**9)
    kept = [process.stdout.readline().strip() for _ in range(20)][-1]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    cache = VerdictCache(file, "correct", bool)
    assert all(cache.get(f"killed {number}") for number in range(int(kept) + 1))
    cache.put("next", False, {})
    assert VerdictCache(file, "correct", bool).get("next") is False
    assert all(json.loads(line) for line in file.read_text().splitlines())


def test_runs_that_write_at_once_do_not_mix_their_lines(tmp_path):
    file = tmp_path / "verdicts.jsonl"
    processes = [writer(file, name, 200) for name in "ab"]
    for process in processes:
        process.communicate()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(line["key"] for line in lines) == sorted(f"{name} {n}" for name in "ab" for n in range(200))


def test_a_file_that_cannot_be_used_costs_requests_and_one_line_but_no_verdict(fake, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    settings = dataclasses.replace(SETTINGS)
    for file in (tmp_path / "file" / "verdicts.jsonl", tmp_path):
        caplog.clear()
        cases = [dataclasses.replace(CASE, own_answer=str(number)) for number in range(5)]
        cache = VerdictCache(file, "correct", bool)
        assert Judge(settings, [fake.base], None, cache).judge(cases) == [True] * 5
        assert caplog.text.count("verdicts are not kept") == 1


def test_prompts_with_any_character_can_be_kept(fake, tmp_path):
    case = Case("\ud800 lone \u2028 surrogate", "\x00\r\n4", "vier \U0001d7d2")
    assert verdict(fake.base, tmp_path / "verdicts.jsonl", case) is True
    assert "vier" in prompt_of(fake.requests[0])
    fake.requests.clear()
    assert verdict(fake.base, tmp_path / "verdicts.jsonl", case) is True
    assert fake.requests == []
