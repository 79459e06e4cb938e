"""Questions of reasoning-gym: no question in two splits, the same for the same seed, one line for what cannot be."""

import logging

import pytest

from nemo_jepo.config.check import check
from nemo_jepo.config.compose import compose, resolve
from nemo_jepo.config.data import WORKED_TASKS
from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import AnswerConfig, DataConfig
from nemo_jepo.data.dataset import load_prompts
from nemo_jepo.data.reasoning_gym import MANY_ANSWERS, reasoning_gym_rows
from nemo_jepo.data.worked import WRITERS
from tests.support.small_tokenizers import BUILDERS

pytest.importorskip("reasoning_gym")

SMALL = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
"""10 numbers, two signs, 10 numbers: 200 questions."""


def settings(task="chain_sum", task_args=None, **others):
    return DataConfig(name="reasoning_gym", task=task, task_args=task_args or {}, **others)


def test_no_question_is_in_two_splits_and_validation_does_not_depend_on_the_size_of_training():
    data = settings(task_args={"max_terms": 2, "max_digits": 1}, num_train_prompts=60, num_validation_prompts=40)
    train, validation = (reasoning_gym_rows(data, split) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (60, 40)
    assert len({row.question for row in [*train, *validation]}) == 100
    data.num_train_prompts = 100
    assert reasoning_gym_rows(data, "validation") == validation
    assert reasoning_gym_rows(data, "train")[:60] == train


def test_another_seed_has_other_questions_and_the_same_seed_the_same():
    first, other, again = (reasoning_gym_rows(settings(num_train_prompts=9, seed=seed), "train") for seed in (1, 2, 1))
    assert [row.question for row in first] == [row.question for row in again]
    assert {row.question for row in first}.isdisjoint(row.question for row in other)


def test_a_task_with_few_questions_says_how_many_it_has(caplog):
    data = settings(task_args=SMALL, num_train_prompts=500, num_validation_prompts=50)
    with caplog.at_level(logging.WARNING):
        assert len(reasoning_gym_rows(data, "train")) == 150
    assert "chain_sum has 200 different questions with these data.task_args: 150 to train on, 50" in caplog.text


def test_a_task_with_too_few_questions_is_refused():
    data = settings(task_args=SMALL, num_validation_prompts=128)
    with pytest.raises(
        ConfigError, match="num_validation_prompts=128: data.task=chain_sum has 200 different questions"
    ):
        reasoning_gym_rows(data, "train")


@pytest.mark.parametrize(
    ("task", "arguments", "line"),
    [
        ("chain_sums", {}, "data.task='chain_sums': .* no such task among its 106. Did you mean chain_sum"),
        ("chain_sum", {"max_term": 3}, "data.task_args.max_term=3: .* no such argument. Did you mean max_terms"),
        ("chain_sum", {"seed": 3}, "data.task_args.seed=3: .* no such argument"),
        ("chain_sum", {"max_terms": 1}, "data.task_args=.*: data.task=chain_sum refuses them: max_terms must be"),
        ("chain_sum", {"max_terms": "many"}, "data.task_args=.*refuses them"),
        ("graph_color", {}, "data.task='graph_color': it has no reference answer"),
        ("composite", {}, "data.task_args=.*: data.task=composite refuses them"),
        *((task, {}, f"data.task='{task}': its questions have several true answers") for task in MANY_ANSWERS[:2]),
    ],
)
def test_what_cannot_be_is_one_line(task, arguments, line):
    with pytest.raises(ConfigError, match=line):
        reasoning_gym_rows(settings(task, arguments), "train")


def test_every_refused_task_is_one_of_the_package():
    from reasoning_gym.factory import DATASETS

    assert set(MANY_ANSWERS) < set(DATASETS)


def test_prompts_know_what_their_scorer_reads_and_their_golden_chain():
    data = settings(num_train_prompts=3, num_validation_prompts=2)
    for split, first in (("train", 2), ("validation", 0)):
        prompts = load_prompts(data, split, BUILDERS["byte_level"](), AnswerConfig()).prompts
        assert [prompt.prompt_id for prompt in prompts] == list(range(first, first + len(prompts)))
        assert all(prompt.task_entry and prompt.chain_of_thought.endswith(f"= {prompt.answer}") for prompt in prompts)


@pytest.mark.parametrize("task", WORKED_TASKS)
def test_a_worked_chain_ends_in_the_packages_answer(task):
    rows = reasoning_gym_rows(settings(task, num_train_prompts=3000), "train")
    for row in rows:
        last = row.chain_of_thought.splitlines()[-1]
        if task == "chain_sum" or " = " in last:
            assert last.endswith(f"= {row.answer}")
        else:  # one word has them all
            assert last.endswith(f"({row.answer}).")


def test_every_step_of_a_worked_sum_is_true():
    data = settings(task_args={"allow_negation": True}, num_train_prompts=500)
    for row in reasoning_gym_rows(data, "train"):
        for line in row.chain_of_thought.splitlines():
            left, right = line.split(" = ")
            assert eval(left) == int(right)  # digits and signs that this project wrote


def test_the_settings_know_which_tasks_have_worked_chains():
    assert set(WRITERS) == set(WORKED_TASKS)


def run_settings(*overrides):
    start = ["data=reasoning_gym", "exp_manager.name=x", "pretrained_checkpoint.restore_from_path=null"]
    return resolve(compose("demo", [*start, *overrides]))


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([], "data.task=None: data=reasoning_gym needs one"),
        (["data.task=gcd", "warmup.max_steps=2"], "warmup.sft_target='chain_of_thought': data.task=gcd has no golden"),
        (["data=arithmetic", "data.verifier=task"], "data.verifier='task': data=arithmetic has no scorer"),
    ],
)
def test_rules_between_settings(overrides, line):
    with pytest.raises(ConfigError, match=line):
        check(run_settings(*overrides), 1)


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("nemo_jepo.config.check.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package reasoning-gym. pip install 'nemo_jepo\[tasks\]'"):
        check(run_settings("data.task=chain_sum"), 1)


def test_a_tasks_arguments_are_given_as_a_mapping():
    """Hydra by itself refuses keys that the mapping does not have yet."""
    config = run_settings("data.task=chain_sum", "data.task_args={min_terms: 2, max_terms: 3}", "+data.task_args.x=1")
    assert config.data.task_args == {"min_terms": 2, "max_terms": 3, "x": 1}
