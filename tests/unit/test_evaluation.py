"""Held-out figures on numbers that can be checked by hand."""

import math
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch

from nemo_jepo import evaluate as evaluation
from nemo_jepo.config.schema import Config
from nemo_jepo.evaluate import bounds, evaluate, grade, num_batches, reads_own_answers
from nemo_jepo.objective.records import GroupScores, Scored
from nemo_jepo.objective.tables import group_scores
from nemo_jepo.rollout.queue import RolloutQueue
from nemo_jepo.types import Prompt, Rollout, Scores, Spliced
from tests.support.one_rank import OneRank

NAN = math.nan


def groups(answer_logprob: list[list[float]], valid: list[list[int]], **tables: list[list[int]]) -> GroupScores:
    def table(name: str, default: list[list[int]], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(tables.get(name, default), dtype=dtype)

    return GroupScores(
        answer_logprob=torch.tensor(answer_logprob, dtype=torch.float64),
        valid_mask=torch.tensor(valid, dtype=torch.bool),
        arrived_mask=table("arrived", [[1] * len(row) for row in valid], torch.bool),
        has_marker=table("has_marker", valid, torch.bool),
        chain_length=table("chain_length", valid, torch.int64),
        answer_length=table("answer_length", valid, torch.int64),
        chain_log_ratio=torch.zeros(len(valid), len(valid[0]), dtype=torch.float64),
    )


def means(scores: GroupScores) -> dict[str, float]:
    return {name: total / count for name, (total, count) in bounds(scores).items()}


def test_proxy_nll_is_minus_log_of_the_mean_likelihood():
    """Likelihoods 1/2 and 1/8: mean 5/16. The single-sample bound averages the logs: -(log 2 + log 8) / 2."""
    found = means(groups([[math.log(1 / 2), math.log(1 / 8)]], [[1, 1]], answer_length=[[3, 3]]))
    assert found["proxy_nll"] == pytest.approx(-math.log(5 / 16))
    assert found["bound"] == pytest.approx(math.log(5 / 16))
    assert found["single_sample_bound"] == pytest.approx(-2 * math.log(2))
    assert found["bound_gap"] == pytest.approx(math.log(5 / 16) + 2 * math.log(2))
    assert found["proxy_nll_per_token"] == pytest.approx(-math.log(5 / 16) / 3)
    assert found["effective_sample_size"] == pytest.approx((5 / 8) ** 2 / (1 / 4 + 1 / 64))


def test_long_answers_do_not_underflow():
    found = means(groups([[-5000.0, -5000.0]], [[1, 1]]))
    assert found["proxy_nll"] == pytest.approx(5000.0)


def test_invalid_samples_and_prompts_without_a_valid_one_are_in_no_bound():
    """Prompt 0: one valid of two. Prompt 1: none; whatever stands there counts nowhere but in valid_prompt_rate."""
    found = means(
        groups(
            [[-2.0, NAN], [NAN, -math.inf]],
            [[1, 0], [0, 0]],
            chain_length=[[10, 99], [99, 99]],
            answer_length=[[4, 0], [0, 0]],
        )
    )
    assert found["proxy_nll"] == pytest.approx(2.0)
    assert found["single_sample_bound"] == pytest.approx(-2.0)
    assert found["bound_gap"] == pytest.approx(0.0)
    assert found["proxy_nll_per_token"] == pytest.approx(0.5)
    assert found["effective_sample_size"] == pytest.approx(1.0)
    assert found["valid_prompt_rate"] == 0.5
    assert found["cot_tokens_mean"] == 10.0


def test_per_token_figures_weigh_prompts_by_their_answers():
    """3 nats over 1 token and 5 nats over 7: 8 / 8, not the mean of 3 and 5/7."""
    found = means(groups([[-3.0, -3.0], [-5.0, -5.0]], [[1, 1], [1, 1]], answer_length=[[1, 1], [7, 7]]))
    assert found["proxy_nll"] == pytest.approx(4.0)
    assert found["proxy_nll_per_token"] == pytest.approx(1.0)


def test_marker_rate_is_over_samples_that_arrived():
    found = means(groups([[-1.0] * 4], [[1, 0, 0, 0]], has_marker=[[1, 1, 0, 0]], arrived=[[1, 1, 1, 0]]))
    assert found["marker_rate"] == pytest.approx(2 / 3)


def test_a_rank_without_prompts_adds_nothing():
    empty = torch.zeros(0, 4)
    none = GroupScores(
        answer_logprob=empty,
        valid_mask=empty.bool(),
        arrived_mask=empty.bool(),
        has_marker=empty.bool(),
        chain_length=empty.long(),
        answer_length=empty.long(),
        chain_log_ratio=empty,
    )
    assert set(bounds(none).values()) == {(0.0, 0.0)}


def test_a_right_answer_earns_one_none_or_a_wrong_one_zero_and_a_fault_nothing():
    """Own answers by sample; the verifier times out on "slow"."""
    texts = {0: "4", 1: "5", 2: None, 3: "slow", 4: "never asked"}
    asked: list[tuple[str, str]] = []

    def verify(pairs: list[tuple[str, str]]) -> list[bool | None]:
        asked.extend(pairs)
        return [None if own == "slow" else own == reference for own, reference in pairs]

    splicer = SimpleNamespace(own_answer_text=lambda rollout: texts[rollout.sample])
    verifier = SimpleNamespace(verify=verify)
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
        samples = range(request.num_generations_per_prompt)
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
                (*prompts[rollout.group].token_ids, *rollout.token_ids, 9),
                len(prompts[rollout.group].token_ids),
                2,
                1,
                valid=prompts[rollout.group].prompt_id != 5,
                has_marker=True,
                generation_logprobs=rollout.generation_logprobs,
            )
            for rollout in rollouts
        ]

    def own_answer_text(self, rollout):
        return str(sum(rollout.token_ids))

    def marker_span(self, token_ids):
        return None

    def score(self, actor, sequences, rewards, group_size):
        self.events.append(f"scored {len(sequences)}")

        def scores(factor: float) -> Scores:
            per_token = tuple(-factor * torch.tensor(one.token_ids[one.prompt_length :]).float() for one in sequences)
            return Scores(per_token, tuple(-tensor for tensor in per_token))

        policy, reference = scores(0.3), scores(0.4)
        groups = group_scores(sequences, policy, reference, rewards, group_size)
        return Scored(sequences=sequences, rows=[], policy=policy, reference=reference, groups=groups)


def evaluated(monkeypatch, sampler: str, layout: OneRank) -> tuple[object, list[str]]:
    """What `evaluate` returns for PROMPTS with steps of 3 prompts, and what happened in which order."""
    model, config = Model(), Config()
    config.rollout.name, config.trainer.jepo.num_prompts_per_step = sampler, 3
    config.evaluation.num_generations_per_prompt = 2
    monkeypatch.setattr(evaluation, "score", model.score)
    monkeypatch.setattr(evaluation, "sync_weights", lambda t: None)
    t = SimpleNamespace(
        config=config,
        layout=layout,
        rollouts=RolloutQueue(model, layout, None, None, 0, 0),
        splicer=model,
        actor=SimpleNamespace(num_steps=3),
        verifier=SimpleNamespace(verify=lambda pairs: [own == reference for own, reference in pairs]),
        servers=None,
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
    assert events == ["asked for 1", "asked for 1", "asked for 2", "scored 2", "scored 2", "scored 4"]


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
