"""The scorer of a reasoning-gym task in its process: what it calls true, and that no answer can hold a run."""

import pytest

from nemo_jepo.config.schema import AnswerConfig, DataConfig
from nemo_jepo.data.dataset import load_prompts
from nemo_jepo.rewards.task import TaskScorer
from tests.support.command_line import metrics, run
from tests.support.small_tokenizers import BUILDERS

pytest.importorskip("reasoning_gym")
pytestmark = pytest.mark.quick


def one_prompt(task):
    data = DataConfig(name="reasoning_gym", task=task, num_train_prompts=1, num_validation_prompts=1)
    (prompt,) = load_prompts(data, "train", BUILDERS["byte_level"](), AnswerConfig()).prompts
    return prompt


def test_a_score_below_one_is_false_and_a_full_stop_is_nothing():
    prompt = one_prompt("letter_counting")
    with TaskScorer("letter_counting", {}, 20) as scorer:
        assert scorer.is_right(prompt.answer, prompt) is True
        assert scorer.is_right(f"{prompt.answer}.", prompt) is True
        two = f"{prompt.answer} {int(prompt.answer) + 1}"  # the package gives it a part of a point
        assert scorer.is_right(two, prompt) is False
        assert scorer.is_right("", prompt) is False


def test_an_answer_that_makes_one_claim_is_asked_about_as_that_claim():
    prompt = one_prompt("chain_sum")
    other = int(prompt.answer) + 1
    with TaskScorer("chain_sum", {}, 20) as scorer:
        for own in ("**{}**", "{}\nThe final answer is {}", "{}. I hope that it is right."):
            assert scorer.is_right(own.format(prompt.answer, prompt.answer), prompt) is True
            assert scorer.is_right(own.format(other, other), prompt) is False
        assert scorer.is_right(f"{prompt.answer}\nThe final answer is {other}", prompt) is False
        assert scorer.is_right(f"{prompt.answer} or {other}", prompt) is False


def test_an_answer_that_would_never_be_read_to_its_end_is_a_fault_and_the_next_one_is_not():
    """The scorer of integrals evaluates what it reads."""
    prompt = one_prompt("simple_integration")
    with TaskScorer("simple_integration", {}, 2) as scorer:
        assert scorer.is_right(f"{'9**' * 5}9", prompt) is None
        assert scorer.is_right(prompt.answer, prompt) is True


def test_a_run_is_rewarded_and_evaluated_by_the_tasks_scorer(tmp_path):
    """A model that copies nothing right yet: both metrics are there, and agree, because both are the scorer's."""
    sizes = ["data.num_train_prompts=20", "data.max_prompt_tokens=90", "data.max_answer_tokens=8"]
    data = ["data=reasoning_gym", "data.task=chain_sum", "data.task_args={max_terms: 2, max_digits: 1}", *sizes]
    learner = ["objective=rloo", "rollout.stop_at_marker=false", "data.verifier=task", "rollout.max_tokens=40"]
    run("train", tmp_path, *data, *learner, "model.tokens_per_micro_batch=160", "trainer.jepo.max_steps=2")
    last = metrics(tmp_path)[-1]
    assert last["val_rollouts/accuracy"] == last["val_rollouts/oracle_accuracy"]
    assert last["val_rollouts/verifier_faults"] == 0
    assert "train_rollouts/reward" in last
