"""Self-verification: what stands behind an own answer, its weight, and that it changes nothing before it."""

from dataclasses import replace
from math import log

import pytest
import torch

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import SelfVerificationConfig
from nemo_jepo.data.verdict import VerdictWriter
from nemo_jepo.metrics import verdict_metrics
from nemo_jepo.objective import sample_weights, token_weights
from nemo_jepo.objective.records import Scored
from nemo_jepo.objective.tables import group_scores
from nemo_jepo.types import Prompt, Scores, Spliced, SplicedBatch
from tests.support.small_tokenizers import BUILDERS, small_tokenizer
from tests.unit.objective.batches import rule_of

ASKED = SelfVerificationConfig(weight=0.5)
PROMPTS = [Prompt(0, (9, 8), "q", "a"), Prompt(1, (9,), "q", "a", verifiable=False), Prompt(2, (7,), "q", "a")]
REWARDS = [1.0, 0.0, None, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]


def own(group: int, sample: int, chain: int = 3, answer: int = 2, valid: bool = True, failed: bool = False) -> Spliced:
    prompt = PROMPTS[group].token_ids
    total = 0 if failed else chain + answer
    return Spliced(
        group,
        sample,
        prompt + tuple(range(20, 20 + total)),
        len(prompt),
        0 if failed else chain,
        0 if failed else answer,
        valid=valid and not failed,
        has_marker=valid,
        own_answer=not failed,
        failed=failed,
        generation_logprobs=(-1.0,) * total,
    )


SEQUENCES = [
    own(0, 0),
    own(0, 1, answer=4),
    own(0, 2),  # no verdict of the verifier
    own(1, 0),
    own(1, 1),
    own(1, 2),
    own(2, 0),
    own(2, 1, answer=0, valid=False),  # no answer
    own(2, 2, failed=True),
]


@pytest.fixture(params=["byte_level", "sentencepiece"])
def writer(request) -> VerdictWriter:
    return VerdictWriter(small_tokenizer(request.param), ASKED)


def test_an_own_answer_with_a_reward_is_asked_about_and_nothing_before_changes(writer):
    found = writer.targets(PROMPTS, SEQUENCES, REWARDS)
    assert [one.verdict for one in found] == [True, False, None, None, None, None, True, None, None]
    for before, after in zip(SEQUENCES, found, strict=True):
        if after.verdict is None:
            assert after == before
            continue
        assert after.token_ids[: before.length] == before.token_ids
        assert after.length == before.length + after.question_length + after.verdict_length
        assert after.length <= before.length + writer.num_tokens
        plain = replace(after, token_ids=before.token_ids, question_length=0, verdict_length=0, verdict=None)
        assert plain == before


@pytest.mark.parametrize("name", [name for name in BUILDERS if not name.startswith("metaspace")])  # these lack "?"
def test_the_words_are_those_of_the_settings(name):
    tokenizer = small_tokenizer(name)
    written = VerdictWriter(tokenizer, ASKED).append(SEQUENCES[0], True)
    tail = written.token_ids[SEQUENCES[0].length :]
    text = tokenizer.decode(list(tail), clean_up_tokenization_spaces=False)
    assert "".join(text.split()).lower() == "isthisanswercorrect?yes"


def test_verdicts_that_cannot_be_told_apart_are_refused():
    with pytest.raises(ConfigError, match="the two verdicts must differ"):
        VerdictWriter(small_tokenizer(list(BUILDERS)[0]), SelfVerificationConfig(yes=" Yes", no=" Yes"))


def scored(sequences: list[Spliced]) -> Scored:
    """With log-probs that are the same for the same tokens."""
    policy = []
    for one in sequences:
        generator = torch.Generator().manual_seed(one.group * 10 + one.sample)
        size = 0 if one.failed else one.length - one.prompt_length
        policy.append(-torch.rand(40, generator=generator)[:size])
    scores = Scores(tuple(policy), tuple(policy))
    reference = Scores(tuple(0.9 * values for values in policy))
    batch = SplicedBatch(sequences=sequences, group_size=3, rewards=REWARDS)
    groups = group_scores(batch, scores, reference)
    return Scored(batch=batch, rows=(), policy=scores, reference=reference, groups=groups)


@pytest.mark.parametrize("name", ["rloo", "dpo"])
def test_the_verdict_weighs_lambda_over_samples_and_prompts_and_nothing_else_changes(name, writer):
    """3 prompts arrived; of the first, two of three samples (one has no reward), of the third two of three."""
    rule = replace(rule_of(name), kl_beta=0.0 if name == "dpo" else 0.01)
    plain = scored(SEQUENCES)
    asked = scored(writer.targets(PROMPTS, SEQUENCES, REWARDS))
    before = token_weights(rule, plain, sample_weights(rule, plain.groups))
    learning = replace(rule, verdict_weight=0.5)
    after = token_weights(learning, asked, sample_weights(learning, asked.groups))
    assert any((weights != 0).any() for weights in before)
    for sequence, old, new in zip(asked.sequences, before, after, strict=True):
        torch.testing.assert_close(new[: len(old)], old, rtol=0, atol=0)
        question, verdict = new[len(old) :].split([sequence.question_length, sequence.verdict_length])
        assert (question == 0).all()
        torch.testing.assert_close(verdict, torch.full_like(verdict, 0.5 / 2 / 3))


def test_what_is_asked_behind_an_answer_is_in_no_table(writer):
    plain, asked = scored(SEQUENCES), scored(writer.targets(PROMPTS, SEQUENCES, REWARDS))
    for name in ("answer_logprob", "chain_log_ratio", "own_answer_log_ratio", "end_logprob", "chain_length"):
        tables = getattr(plain.groups, name), getattr(asked.groups, name)
        torch.testing.assert_close(*tables, rtol=0, atol=0, equal_nan=True)


def test_the_metrics_count_verdicts_their_balance_and_what_the_policy_would_have_said(writer):
    sequences = writer.targets(PROMPTS, SEQUENCES, REWARDS)
    likelihoods = iter([0.8, 0.4, 0.1])
    policy = []
    for one in sequences:
        values = torch.full((one.length - one.prompt_length,), -7.0)
        if one.verdict is not None:
            values[-one.verdict_length :] = log(next(likelihoods)) / one.verdict_length
        policy.append(values)
    found = verdict_metrics(sequences, Scores(tuple(policy)))
    assert found["verdict_yes_rate"] == (2.0, 3.0)
    assert found["verdict_accuracy"] == (1.0, 3.0)
    assert found["verdict_nll"] == (pytest.approx(-log(0.8) - log(0.4) - log(0.1), rel=1e-5), 3.0)
