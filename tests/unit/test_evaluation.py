"""An evaluation from the samples to its metrics, by a sampler and scores that can be computed by hand."""

import math
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_jepo import evaluate as evaluation
from nemo_jepo.config.schema import Config
from nemo_jepo.evaluate import evaluate, grade, num_batches, pass_rates, reads_own_answers
from nemo_jepo.objective.records import GroupScores, Scored
from nemo_jepo.objective.tables import group_scores
from nemo_jepo.rollout.queue import RolloutQueue
from nemo_jepo.types import Prompt, Rollout, Scores, Spliced
from tests.support.one_rank import OneRank


def test_a_right_answer_earns_one_none_or_a_wrong_one_zero_and_a_fault_nothing():
    """Own answers by sample; the verifier times out on "slow"."""
    texts = {0: "4", 1: "5", 2: None, 3: "slow", 4: "never asked"}
    asked: list[tuple[str, str]] = []

    def is_right(own: str, prompt: Prompt) -> bool | None:
        asked.append((own, prompt.answer))
        return None if own == "slow" else own == prompt.answer

    splicer = SimpleNamespace(own_answer_text=lambda rollout: texts[rollout.sample])
    verifier = SimpleNamespace(is_right=is_right)
    prompts = [Prompt(0, (1,), "q", "unused"), Prompt(1, (1,), "2+2", "4")]
    finish = ["stop", "stop", "length", "stop", "failed"]
    rollouts = [Rollout(1, sample, (1,), (0.0,), reason) for sample, reason in enumerate(finish)]
    assert grade(verifier, splicer, OneRank(), prompts, rollouts) == [1.0, 0.0, 0.0, None, None]
    assert asked == [("4", "4"), ("5", "4"), ("slow", "4")]


def test_ranks_without_a_sampler_are_told_the_verdicts():
    other_rank = OneRank(is_replica_head=False, share_in_replica=lambda value: [1.0, None])
    assert grade(None, None, other_rank, [], []) == [1.0, None]


PROMPTS = tuple(Prompt(number, (1,) * (1 + number % 3), f"q{number}", str(number)) for number in range(8))


class Model:
    """A sampler, an actor's scores and a splicer whose answers depend on nothing but prompt and sample."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def submit(self, prompts, request, stop):
        self.events.append(f"asked for {len(prompts)}")
        drawn: Future[list[Rollout]] = Future()
        is_greedy = request.temperature == 0
        assert not is_greedy or request.num_generations_per_prompt == 1
        samples = [0] if is_greedy else range(request.num_generations_per_prompt)
        drawn.set_result(
            [
                Rollout(group, i, (prompt.prompt_id, i), (-0.5 * i,) * 2, "stop", 3)
                for group, prompt in enumerate(prompts)
                for i in samples
            ]
        )
        return drawn

    def counts(self) -> dict[str, float]:
        return {}

    def splice_reference(self, prompts, rollouts):
        return [
            Spliced(
                rollout.group,
                rollout.sample,
                (*prompts[rollout.group].token_ids, *rollout.token_ids, 9 - rollout.sample),
                len(prompts[rollout.group].token_ids),
                2,
                1,
                valid=prompts[rollout.group].prompt_id != 5,
                has_marker=True,
                generation_logprobs=rollout.generation_logprobs,
            )
            for rollout in rollouts
        ]

    def supervised(self, prompts, target):
        assert target == "marked_answer"
        return [
            Spliced(group, 0, (*prompt.token_ids, 4, 9), len(prompt.token_ids), 1, 1, valid=True, has_marker=True)
            for group, prompt in enumerate(prompts)
        ]

    def own_answer_text(self, rollout):
        return str(sum(rollout.token_ids))

    def marker_span(self, token_ids):
        return None

    def score(self, actor, batch):
        sequences = batch.to_score
        self.events.append(f"scored {len(sequences)}")

        def scores(factor: float) -> Scores:
            per_token = tuple(-factor * torch.tensor(one.token_ids[one.prompt_length :]).float() for one in sequences)
            return Scores(per_token, tuple(-tensor for tensor in per_token))

        policy, reference = scores(0.3), scores(0.4)
        groups = group_scores(batch, policy, reference)
        return Scored(batch=batch, rows=[], policy=policy, reference=reference, groups=groups)


def evaluated(monkeypatch, sampler: str, layout: OneRank, greedy: bool = True) -> tuple[Any, list[str]]:
    """What `evaluate` returns for PROMPTS with steps of 3 prompts, and what happened in which order."""
    model, config = Model(), Config()
    config.rollout.name, config.trainer.jepo.num_prompts_per_step = sampler, 3
    config.evaluation.num_generations_per_prompt, config.evaluation.greedy = 2, greedy
    monkeypatch.setattr(evaluation, "score", model.score)
    monkeypatch.setattr(evaluation, "sync_weights", lambda t: None)
    t = SimpleNamespace(
        config=config,
        layout=layout,
        rollouts=RolloutQueue(model, layout, None, None, 0, 0),
        splicer=model,
        actor=SimpleNamespace(num_steps=3),
        verifier=SimpleNamespace(is_right=lambda own, prompt: own == prompt.answer),
        servers=None,
        verdicts=None,
        tokenizer=SimpleNamespace(decode=str),
    )
    return evaluate(t, PROMPTS), model.events


@pytest.mark.parametrize("replica", [0, 1])
def test_batches_change_no_metric_and_no_record_and_every_replica_has_as_many(monkeypatch, replica):
    """8 prompts, 4 on each of two replicas, 3 a step: three batches, all asked for before the first is scored."""
    layout = OneRank(data_parallel_rank=replica, data_parallel_size=2)
    whole, _ = evaluated(monkeypatch, "embedded", layout)
    batched, events = evaluated(monkeypatch, "vllm", layout)
    assert batched == whole
    assert {"accuracy", "proxy_nll", "kl", "entropy", "marker_rate"} <= set(whole[0])
    scored = ["scored 3", "scored 3", "scored 6"]  # two samples of each prompt, and one sequence without a chain
    assert events == ["asked for 1", "asked for 1", "asked for 2", *scored, "asked for 4"]  # last: the likeliest


def test_the_chain_gain_is_measured_against_the_same_answer_without_a_chain(monkeypatch):
    """A token costs 0.3 nats times its id: l0 = -2.7 of token 9, l_i = -2.7 and -2.4; prompt 5 has no valid sample."""
    (metrics, records, _), _ = evaluated(monkeypatch, "vllm", OneRank())
    assert metrics["no_chain_nll"] == pytest.approx(2.7)
    assert metrics["chain_gain"] == metrics["chain_gain_median"] == pytest.approx(0.15)
    assert metrics["valid_prompt_rate"] == 7 / 8
    bound = -math.log((math.exp(-2.7) + math.exp(-2.4)) / 2)
    assert metrics["proxy_nll"] == metrics["proxy_nll_valid"] == pytest.approx(bound)
    assert metrics["proxy_nll_median"] == pytest.approx(bound)
    assert metrics["cot_tokens_mean"] == 2  # the sequences without a chain are in no other metric
    assert [record["chain_gain"] for record in records] == pytest.approx([0.0] * 4, abs=1e-6)
    assert [record["no_chain_logprob"] for record in records] == pytest.approx([-2.7] * 4)


def test_the_likeliest_completion_is_graded_apart_and_can_be_left_out(monkeypatch):
    """Completion (prompt_id, 0) answers its prompt_id, which is right; (prompt_id, 1) is wrong."""
    (metrics, *_), _ = evaluated(monkeypatch, "embedded", OneRank())
    assert (metrics["accuracy_greedy"], metrics["accuracy"], metrics["avg_at_2"]) == (1.0, 0.5, 0.5)
    assert (metrics["pass_at_2"], metrics["maj_at_2"]) == (1.0, 0.5)
    (without, *_), events = evaluated(monkeypatch, "embedded", OneRank(), greedy=False)
    assert without == {name: value for name, value in metrics.items() if not name.endswith("_greedy")}
    assert metrics["verifier_faults_greedy"] == 0
    assert events == ["asked for 8", "scored 24"]


def test_a_sampler_that_draws_before_it_answers_gets_one_batch():
    config = Config()
    config.trainer.jepo.num_prompts_per_step = 64
    assert num_batches(config, 640) == 1
    config.rollout.name = "vllm"
    assert [num_batches(config, prompts) for prompts in (0, 1, 64, 65, 640)] == [1, 1, 1, 2, 10]


def test_own_answers_are_decoded_where_somebody_reads_them_alone():
    def reads(verify: bool = True, verifiable: bool = True, judge: str | None = None, data: str = "jsonl") -> bool:
        config = Config()
        config.data.name, config.evaluation.verify, config.evaluation.judge.url = data, verify, judge
        return reads_own_answers(config, [Prompt(0, (1,), "q", "a", verifiable=verifiable)])

    assert reads()
    assert not reads(verify=False)
    assert not reads(verifiable=False)  # the verifier is asked about none of them
    assert reads(verifiable=False, judge="http://judge/v1")
    assert reads(verify=False, data="arithmetic")  # the oracle


# ---- pass rates ------------------------------------------------------------------------------------------------------


def groups(arrived: list[int], valid: list[int], logprob: float) -> GroupScores:
    """Two prompts of four samples: how many of each arrived and are valid, the first ones; answers of 2 tokens."""
    first = torch.arange(4).expand(2, 4)
    arrived_mask, valid_mask = (first < torch.tensor([[count] for count in counts]) for counts in (arrived, valid))
    return GroupScores(
        answer_logprob=torch.full((2, 4), logprob, dtype=torch.float64),
        valid_mask=valid_mask,
        arrived_mask=arrived_mask,
        has_marker=valid_mask,
        chain_length=torch.full((2, 4), 3),
        answer_length=torch.full((2, 4), 2),
        chain_log_ratio=torch.zeros(2, 4, dtype=torch.float64),
    )


def test_a_question_passes_as_often_as_its_samples_are_right_or_as_likely_as_its_answer_is():
    """Two replicas. Right, wrong and a fault of three samples; likelihoods where nobody can tell, 0 without a marker;
    all right; and a question of which nothing arrived, which has no line."""
    prompts = [Prompt(n, (1,), f"q{n}", "4", verifiable=n != 2) for n in range(4)]
    halves = [
        (groups([3, 4], [3, 3], -1.0), [1.0, 0.0, None, None, 0.0, 0.0, 0.0, 0.0], [0, 2]),
        (groups([4, 0], [4, 0], -2.0), [1.0] * 4 + [None] * 4, [1, 3]),
    ]
    tables: list[torch.Tensor] = []
    for scores, verdicts, place in halves:
        pass_rates(scores, verdicts, place, prompts, lambda table: tables.append(table) or table)
    scores, verdicts, place = halves[0]
    assert pass_rates(scores, verdicts, place, prompts, lambda _: tables[0] + tables[1]) == [
        {"question": "q0", "pass_rate": pytest.approx(1 / 3), "num_samples": 3, "by": "verifier"},
        {"question": "q1", "pass_rate": 1.0, "num_samples": 4, "by": "verifier"},
        {"question": "q2", "pass_rate": pytest.approx(3 / 4 * math.exp(-0.5)), "num_samples": 4, "by": "likelihood"},
    ]


def test_where_nobody_verifies_likelihood_says_it_of_every_question():
    prompts = [Prompt(n, (1,), f"q{n}", "4") for n in range(2)]
    found = pass_rates(groups([4, 4], [4, 2], -1.0), None, [0, 1], prompts, lambda table: table)
    assert [row["by"] for row in found] == ["likelihood"] * 2
    assert [row["pass_rate"] for row in found] == pytest.approx([math.exp(-0.5), math.exp(-0.5) / 2])
