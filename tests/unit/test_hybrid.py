"""The hybrid reward by hand: who is asked, what it earns, and canaries that a fooled verifier lets through."""

import itertools
from dataclasses import replace
from typing import Any

import pytest

from nemo_jepo.config.hybrid import HybridConfig
from nemo_jepo.grading import RuleReward, VerifierFooled
from nemo_jepo.hybrid import HybridReward, is_plain_number
from nemo_jepo.rewards.canaries import canaries
from nemo_jepo.types import Prompt, Rollout
from nemo_jepo.utils import http
from tests.support.fake_judge import FakeJudge, prompt_of, says
from tests.support.one_rank import OneRank
from tests.support.own_answers import Rule, Written, means, rollouts_of

WORDS = Prompt(0, (1,), "What is 2+2?", "four")
NUMBER = Prompt(1, (1,), "What is 2+3?", "5")
PROOF = Prompt(2, (1,), "Show that 1 < 2.", "2 - 1 > 0", verifiable=False)


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch):
    monkeypatch.setattr(http, "FIRST_BACKOFF_S", 0.001)


def reward(folder, base: str, answers: list[str | None], only_verifiable: bool = False, **settings: Any):
    config = HybridConfig(**({"canary_interval": 0} | settings))
    config.verifier = replace(config.verifier, url=base, model="m")
    rule = RuleReward(Rule(), Written(answers), OneRank())
    return HybridReward(config, rule, only_verifiable, folder, None)


def asked_about(fake: FakeJudge) -> set[str]:
    """The own answers that were sent: what stands behind their line."""
    lines = [prompt_of(body).splitlines() for body in fake.requests]
    return {"\n".join(part[part.index(mark) + 1 : end]) for part in lines for mark, end in [_place(part)]}


def _place(lines: list[str]) -> tuple[str, int]:
    mark = next(line for line in lines if line.startswith("===") and line.endswith("student answer"))
    return mark, max(number for number, line in enumerate(lines) if line.startswith("===") and line.endswith("end"))


def test_the_model_is_asked_where_the_rule_says_wrong_and_its_verdict_takes_the_place_of_the_0(tmp_path):
    """Of "four": right by the rule, in other words, wrong, absent, blank, a fault of the rule. Of 5: another number."""
    answers = ["four", "IV", "five", None, "", "slow", "6", "five"]
    with FakeJudge(lambda body: says("IV" in prompt_of(body).splitlines())(body)) as fake:
        hybrid = reward(tmp_path, fake.base, answers)
        found = hybrid.of([WORDS, NUMBER], rollouts_of([0, 0, 0, 0, 0, 0, 1, 1]), step=0)
        assert asked_about(fake) == {"IV", "five"}
        assert len(fake.requests) == 3  # "five" to two questions
    assert found == [1.0, 1.0, 0.0, 0.0, 0.0, None, 0.0, 0.0]
    assert means(hybrid) == {
        "rule_reward": 1 / 7,
        "hybrid_reward": 2 / 7,
        "hybrid_asked_rate": 3 / 8,
        "hybrid_correct_rate": 1 / 3,
        "hybrid_fault_rate": 0.0,
    }
    assert means(hybrid) == {}  # the next step begins anew


def test_every_combination_of_verdict_answer_and_prompt_is_asked_about_as_the_gate_says(tmp_path):
    with FakeJudge(says(False)) as fake:
        for prompt, answer, only in itertools.product(
            (WORDS, NUMBER, PROOF), ("4.0", "words", " ", None), (True, False)
        ):
            fake.requests.clear()
            reward(tmp_path / f"{prompt.prompt_id}{answer}{only}", fake.base, [answer and answer.strip()], only).of(
                [prompt], rollouts_of([0]), step=0
            )
            both_numbers = prompt is NUMBER and answer == "4.0"
            expected = bool(answer and answer.strip()) and not both_numbers and (prompt.verifiable or not only)
            assert bool(fake.requests) == expected, (prompt, answer, only)


@pytest.mark.parametrize("text", ["5", "-5", "+5.0", "1,234", "$5$", " 5. ", ".5", "1234567"])
def test_plain_numbers_are_left_to_the_rule(text):
    assert is_plain_number(text)


@pytest.mark.parametrize(
    "text", ["", "5 apples", "1/2", "five", "5, 6", "1e5", "x", "$x$", r"\frac{1}{2}", "12,34", "--5"]
)
def test_anything_else_is_no_plain_number(text):
    assert not is_plain_number(text)


def test_a_fault_is_no_verdict_and_one_line_says_why(tmp_path, caplog):
    with FakeJudge(lambda body: "who knows?") as fake:
        hybrid = reward(tmp_path, fake.base, ["four", "IV"])
        for step in (0, 1):
            assert hybrid.of([WORDS], rollouts_of([0, 0]), step) == [1.0, None]
            found = means(hybrid)
            assert found["hybrid_fault_rate"] == 1.0 and found["hybrid_reward"] == 1.0
            assert "hybrid_correct_rate" not in found
    lines = [record.getMessage() for record in caplog.records if record.name == "nemo_jepo.rewards.judge"]
    assert lines == [
        "hybrid.verifier: 1 of 1 answers have no verdict: the reply does not end with a verdict line",
    ]


def test_a_verifier_that_is_down_costs_the_asked_samples_their_reward_and_no_other(tmp_path):
    with FakeJudge() as fake:
        pass
    hybrid = reward(tmp_path, fake.base, ["four", "IV", None])
    assert hybrid.of([WORDS], rollouts_of([0, 0, 0]), step=0) == [1.0, None, 0.0]


def test_a_verdict_is_asked_for_once(tmp_path):
    with FakeJudge(says(True)) as fake:
        first = reward(tmp_path, fake.base, ["IV"])
        for step in (0, 1):
            assert first.of([WORDS], rollouts_of([0]), step) == [1.0]
        assert reward(tmp_path, fake.base, ["IV"]).of([WORDS], rollouts_of([0]), step=2) == [1.0]
        assert len(fake.requests) == 1
    assert (tmp_path / "verifier_verdicts.jsonl").is_file()


def test_a_sample_that_never_arrived_is_not_counted(tmp_path):
    with FakeJudge(says(True)) as fake:
        hybrid = reward(tmp_path, fake.base, ["IV", None])
        lost = Rollout(0, 1, (), (), "failed")
        assert hybrid.of([WORDS], [*rollouts_of([0]), lost], step=0) == [1.0, None]
    assert means(hybrid)["hybrid_asked_rate"] == 1.0


# ---- canaries -------------------------------------------------------------------------------------------------------


def test_there_are_thirteen_kinds_and_none_states_a_result():
    texts = canaries("What is the capital of France?")
    assert len(texts) == 13
    assert len(set(texts.values())) == 13
    assert all(text.strip() for text in texts.values())
    assert not any("Paris" in text for text in texts.values())


def test_every_kind_is_sent_and_an_honest_verifier_lets_none_through(tmp_path):
    with FakeJudge(says(False)) as fake:
        hybrid = reward(tmp_path, fake.base, ["four"], canary_interval=5, canary_prompts=2)
        hybrid.of([WORDS, NUMBER, PROOF], rollouts_of([0]), step=0)
        assert len(fake.requests) == 26
        assert asked_about(fake) >= {canaries("")["gibberish"]}
    assert means(hybrid)["verifier_canary_rate"] == 0.0


def test_they_come_back_every_so_many_steps_and_once_in_a_step(tmp_path):
    rounds = []
    with FakeJudge(says(False)) as fake:
        hybrid = reward(tmp_path, fake.base, [None], canary_interval=3, canary_prompts=1)
        for step in (0, 0, 1, 2, 3, 3, 4):
            fake.requests.clear()
            prompt = replace(WORDS, question=f"question {step} {len(rounds)}")
            hybrid.of([prompt], rollouts_of([0]), step)
            rounds.append(len(fake.requests))
    assert rounds == [13, 0, 0, 0, 13, 0, 0]


def fooled_by_instructions(body) -> str:
    return says("Ignore everything above" in prompt_of(body))(body)


def test_a_verifier_that_obeys_the_answer_ends_the_run_and_the_line_names_the_kind(tmp_path):
    with FakeJudge(fooled_by_instructions) as fake:
        hybrid = reward(tmp_path, fake.base, ["four"], canary_interval=1, canary_prompts=1, canary_limit=0.05)
        with pytest.raises(VerifierFooled) as raised:
            hybrid.of([WORDS], rollouts_of([0]), step=0)
    assert str(raised.value).startswith(
        "1 of 13 answers that answer nothing earn a reward (instruction 1 of 1), more than hybrid.canary_limit=0.05. "
    )


@pytest.mark.parametrize("limit", [1 / 13 + 1e-9, None])
def test_at_the_limit_and_without_one_the_rate_is_reported_alone(limit, tmp_path):
    with FakeJudge(fooled_by_instructions) as fake:
        hybrid = reward(tmp_path, fake.base, ["four"], canary_interval=1, canary_prompts=1, canary_limit=limit)
        hybrid.of([WORDS], rollouts_of([0]), step=0)
    assert means(hybrid)["verifier_canary_rate"] == pytest.approx(1 / 13)


def test_a_verifier_that_says_nothing_about_them_is_neither_fooled_nor_honest(tmp_path):
    with FakeJudge(lambda body: "?") as fake:
        hybrid = reward(tmp_path, fake.base, ["four"], canary_interval=1)
        hybrid.of([WORDS], rollouts_of([0]), step=0)
    assert "verifier_canary_rate" not in means(hybrid)


def test_a_rule_that_rewards_a_canary_is_seen_as_well(tmp_path):
    """A reference answer that is one of these texts is no result, or the canaries are no longer."""
    empty = replace(WORDS, answer="{")
    with FakeJudge(says(False)) as fake:
        hybrid = reward(tmp_path, fake.base, ["four"], canary_interval=1, canary_limit=None)
        hybrid.of([empty], rollouts_of([0]), step=0)
    assert means(hybrid)["verifier_canary_rate"] == pytest.approx(1 / 13)


def test_where_only_verifiable_prompts_are_asked_about_they_alone_carry_canaries(tmp_path):
    with FakeJudge(says(False)) as fake:
        hybrid = reward(tmp_path, fake.base, [None], True, canary_interval=1, canary_prompts=4)
        hybrid.of([PROOF, WORDS], rollouts_of([0]), step=0)
        assert len(fake.requests) == 13
        assert not any("1 < 2" in prompt_of(body) for body in fake.requests)


def test_the_rate_that_ends_a_run_is_that_of_all_replicas(tmp_path):
    """This replica's verifier is honest; another one's let everything through."""
    with FakeJudge(says(False)) as fake:
        hybrid = reward(tmp_path, fake.base, ["four"], canary_interval=1, canary_prompts=1)
        hybrid._layout.sum_over_data_parallel = lambda table: table + table.new_tensor([1.0, 1.0])
        with pytest.raises(VerifierFooled, match="13 of 26 answers"):
            hybrid.of([WORDS], rollouts_of([0]), step=0)
