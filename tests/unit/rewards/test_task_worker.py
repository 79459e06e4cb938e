"""What the worker of a task's scorer answers, without its process."""

import pytest

from nemo_jepo.config.schema import DataConfig

pytest.importorskip("reasoning_gym")


def test_the_packages_scorer_is_asked_about_the_packages_own_record():
    from nemo_jepo.data.reasoning_gym import reasoning_gym_rows
    from nemo_jepo.rewards.task_worker import score

    for task in ("chain_sum", "letter_counting", "syllogism", "number_sorting"):
        for row in reasoning_gym_rows(DataConfig(name="reasoning_gym", task=task, num_train_prompts=20), "train"):
            request = {"task": task, "arguments": {}, "entry": row.task_entry}
            assert score(request | {"answer": row.answer}) == 1
            assert score(request | {"answer": f"{row.answer} or {row.answer}0"}) < 1
