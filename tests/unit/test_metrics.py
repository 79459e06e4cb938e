"""Figures and written rollouts from hand-made sequences."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_jepo.metrics import merge, phase_tokens, rollout_metrics, rollout_records, token_texts, with_prefix
from nemo_jepo.types import Prompt, Rollout, Scores, Spliced
from tests.support.small_tokenizers import BUILDERS, FOREIGN, LETTERS, small_tokenizer

PROMPTS = [
    Prompt(prompt_id=41, token_ids=(9,), question="q0", answer="a0"),
    Prompt(prompt_id=7, token_ids=(9, 8), question="q1", answer="a1"),
]
# Valid; cut off; failed; misaligned.
SEQUENCES = [
    Spliced(
        0,
        0,
        (9, 1, 2, 3, 4),
        1,
        3,
        1,
        valid=True,
        has_marker=True,
        marker_length=2,
        generation_logprobs=(-1.0, -2.0, -3.0),
    ),
    Spliced(0, 1, (9, 5, 6), 1, 2, 0, valid=False, has_marker=False, generation_logprobs=(-1.5, -0.5)),
    Spliced(1, 0, (9, 8), 2, 0, 0, valid=False, has_marker=False, failed=True),
    Spliced(1, 1, (9, 8, 7), 2, 1, 0, False, True, misaligned=True, generation_logprobs=(-4.0,)),
]
ROLLOUTS = [
    Rollout(0, 0, (1, 2, 3), (-1.0, -2.0, -3.0), "stop", policy_version=5),
    Rollout(0, 1, (5, 6), (-1.5, -0.5), "length", policy_version=4),
    Rollout(1, 0, (), (), "failed"),
    Rollout(1, 1, (7,), (-4.0,), "stop", policy_version=2),
]
SCORES = Scores(
    policy_logprobs=tuple(map(torch.tensor, ([-1.5, -2.0, -2.0, -9.0], [-1.5, -1.0], [], [-4.0]))),
    entropies=tuple(map(torch.tensor, ([0.5, 1.0, 1.5, 77.0], [2.0, 2.0], [], [3.0]))),
)


def alone(values: torch.Tensor) -> torch.Tensor:
    """The sum over one rank."""
    return values


def test_a_phase_counts_the_tokens_that_it_handled_on_all_replicas():
    trained, generated = 2 * (5 + 3 + 2 + 3), 2 * (3 + 2 + 0 + 1)
    phases = {"train_time": trained, "logprobs": trained, "init_logprobs": trained, "generate": generated}
    assert phase_tokens(SEQUENCES, ROLLOUTS, 2) == phases
    assert phase_tokens(SEQUENCES, [], 2) == {"train_time": trained}  # sft samples and scores nothing


def test_rollout_figures_are_sums_and_counts():
    assert rollout_metrics(SEQUENCES, ROLLOUTS, SCORES, policy_version=5) == {
        "reasoning_tokens_mean": (1.0, 1.0),  # 3 tokens, of which 2 are the marker; the others are not valid
        "misaligned_rate": (1.0, 3.0),
        "cut_off_rate": (1.0, 3.0),
        "response_tokens_mean": (6.0, 3.0),
        "staleness_mean": (0.0 + 1.0 + 3.0, 3.0),  # the failed one was not sampled by anything
        "logprob_difference": (0.5 + 0.0 + 1.0 + 0.0 + 0.5 + 0.0, 6.0),  # the reference answer was not sampled
        "entropy": (3.0 + 4.0 + 3.0, 6.0),  # chain of thought alone
    }


def test_tempered_samples_have_no_difference_and_all_else():
    """Their log-probs are of another distribution: alone they leave the metric out, beside others they do not count."""
    whole = rollout_metrics(SEQUENCES, ROLLOUTS, SCORES, policy_version=5)
    tempered = [replace(rollout, untempered=False) for rollout in ROLLOUTS]
    found = rollout_metrics(SEQUENCES, tempered, SCORES, policy_version=5)
    assert found == whole | {"logprob_difference": (0.0, 0.0)}
    assert "logprob_difference" not in merge(found, alone)
    mixed = rollout_metrics(SEQUENCES, [ROLLOUTS[0], *tempered[1:]], SCORES, policy_version=5)
    assert mixed["logprob_difference"] == (0.5 + 0.0 + 1.0, 3.0)


def test_an_own_answer_counts_in_the_difference_and_not_in_the_entropy():
    own = Spliced(0, 0, (9, 1, 2), 1, 1, 1, True, True, own_answer=True, generation_logprobs=(-1.0, -1.0))
    scores = Scores(policy_logprobs=(torch.tensor([-2.0, -4.0]),), entropies=(torch.tensor([0.25, 8.0]),))
    found = rollout_metrics([own], [Rollout(0, 0, (1, 2), (-1.0, -1.0), "stop")], scores, 0)
    assert found["logprob_difference"] == (1.0 + 3.0, 2.0)
    assert found["entropy"] == (0.25, 1.0)


def test_means_are_over_all_ranks_together():
    """Rank 0 has one sample of 1, rank 1 three of sum 9: the mean is 10 / 4, not the mean of 1 and 3."""
    ranks = [{"b": (1.0, 1.0), "a": (0.0, 0.0)}, {"a": (4.0, 2.0), "b": (9.0, 3.0)}]
    given: list[torch.Tensor] = []
    for figures in ranks:
        merge(figures, lambda values: (given.append(values), values)[1])
    merged = [merge(figures, lambda values: sum(given)) for figures in ranks]
    assert merged[0] == merged[1] == {"a": 2.0, "b": 2.5}


def test_a_figure_that_nothing_was_measured_for_is_left_out():
    assert merge({"a": (0.0, 0.0), "b": (0.0, 4.0)}, alone) == {"b": 0.0}


def test_prefixes():
    assert with_prefix("val_rollouts", {"x": 1.0}) == {"val_rollouts/x": 1.0}


def records(count: int) -> list[dict]:
    tables = {"advantage": torch.tensor([[0.5, -1.0], [0.0, 2.0]], dtype=torch.float64)}
    return rollout_records(
        PROMPTS, SEQUENCES[:count], SCORES, tables, lambda ids: "".join(f"<{i}>" for i in ids), span_of_three
    )


def span_of_three(ids: Sequence[int]) -> tuple[int, int] | None:
    """A marker that is the token 3."""
    return (ids.index(3), ids.index(3) + 1) if 3 in ids else None


def test_a_written_rollout_shows_text_tokens_log_probs_and_credit():
    assert records(1) == [
        {
            "prompt_id": 41,
            "sample": 0,
            "prompt": "q0",
            "chain_of_thought": "<1><2><3>",
            "answer": "<4>",
            "reference_answer": "a0",
            "valid": True,
            "misaligned": False,
            "failed": False,
            "own_answer": False,
            "prompt_length": 1,
            "chain_length": 3,
            "answer_length": 1,
            "marker": [3, 4],
            "token_ids": [9, 1, 2, 3, 4],
            "tokens": ["<9>", "<1>", "<2>", "<3>", "<4>"],
            "policy_logprobs": [-1.5, -2.0, -2.0, -9.0],
            "generation_logprobs": [-1.0, -2.0, -3.0],
            "advantage": 0.5,
        }
    ]


def test_every_record_is_json_and_belongs_to_its_own_prompt_and_sample():
    written = json.loads(json.dumps(records(4)))
    assert [(r["prompt_id"], r["sample"], r["advantage"]) for r in written] == [
        (41, 0, 0.5),
        (41, 1, -1.0),
        (7, 0, 0.0),
        (7, 1, 2.0),
    ]
    assert [r["answer"] for r in written] == ["<4>", "", "", ""]
    assert all(len(r["tokens"]) == len(r["token_ids"]) for r in written)
    assert all(len(r["policy_logprobs"]) == len(r["token_ids"]) - r["prompt_length"] for r in written)
    assert [r["marker"] for r in written] == [[3, 4], None, None, None]
    assert [r["failed"] for r in written] == [False, False, True, False]


@pytest.mark.parametrize("value", [math.pi, -1e-7])
def test_log_probs_are_written_to_five_decimals(value):
    scores = Scores(policy_logprobs=(torch.tensor([value]),), entropies=(torch.zeros(1),))
    sequence = Spliced(0, 0, (9, 1), 1, 1, 0, True, True)
    (record,) = rollout_records(PROMPTS, [sequence], scores, {}, str, span_of_three)
    assert record["policy_logprobs"][0] == pytest.approx(value, abs=6e-6)
    assert len(str(abs(record["policy_logprobs"][0]))) <= 7


@pytest.mark.parametrize("kind", BUILDERS)
@given(pieces=st.lists(st.text(LETTERS + FOREIGN, max_size=6), max_size=4))
def test_texts_of_tokens_join_to_the_text_with_its_spaces_and_foreign_characters(kind, pieces):
    tokenizer = small_tokenizer(kind)
    ids = [token_id for piece in pieces for token_id in tokenizer.encode(piece, add_special_tokens=False)]
    texts = token_texts(ids, tokenizer.decode)
    assert len(texts) == len(ids) and "".join(texts) == tokenizer.decode(ids)
