"""Stages: their settings follow from the run's, a wrong one is found before anything is built, which part is next."""

from pathlib import Path

import pytest

from nemo_jepo import train
from nemo_jepo.checkpoint.format import latest_checkpoint
from nemo_jepo.config.check import check
from nemo_jepo.config.compose import compose, resolve
from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.parts import folders_in, parts_of
from nemo_jepo.config.schema import UntilConfig
from nemo_jepo.tracking import metrics_of

TWO = (
    "stages=[{max_steps: 3, overrides: {rollout.max_tokens: 24, data.task_args: {max_terms: 3}}},"
    "{max_steps: 4, max_epochs: 2, until: {metric: val_rollouts/accuracy, at_least: 0.6}}]"
)


def settings(*overrides: str):
    return resolve(compose("demo", ["trainer.jepo.max_epochs=7", *overrides]))


def error_of(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check(settings(*overrides), 1)
    return str(caught.value)


def test_a_run_is_its_warm_up_its_stages_and_the_main_run():
    config = settings(TWO)
    check(config, 1)
    parts = parts_of(config)
    assert [part.folder for part in parts] == ["warmup", "stage_1", "stage_2", ""]
    assert [part.config.rollout.max_tokens for part in parts] == [48, 24, 48, 48]
    loops = [part.config.trainer.jepo for part in parts]
    assert [(loop.max_steps, loop.max_epochs) for loop in loops] == [(600, None), (3, None), (4, 2), (60, 7)]
    until = UntilConfig(metric="val_rollouts/accuracy", at_least=0.6)
    assert [loop.until for loop in loops] == [UntilConfig(), UntilConfig(), until, UntilConfig()]
    assert parts[1].config.data.task_args == {"max_terms": 3} and config.data.task_args == {}
    assert all(part.config.stages == [] and part.config.warmup.max_steps == 0 for part in parts)
    assert [part.folder for part in parts_of(settings("warmup.max_steps=0"))] == [""]


def test_the_main_runs_own_end_by_a_metric_is_not_that_of_a_stage_or_a_warm_up():
    own = ["trainer.jepo.until.metric=train_rollouts/valid_rate", "trainer.jepo.until.at_least=1"]
    metrics = [part.config.trainer.jepo.until.metric for part in parts_of(settings(*own, "stages=[{max_steps: 1}]"))]
    assert metrics == [None, None, "train_rollouts/valid_rate"]


@pytest.mark.parametrize(
    ("second", "beginning"),
    [
        ("overrides: {rollout.max_token: 24}", "rollout.max_token=24: no such key. Did you mean rollout.max_tokens"),
        ("overrides: {rollout.max_tokens: many}", "rollout.max_tokens: Value 'many' of type 'str' could not be"),
        ("overrides: {rollout.max_tokens: 0}", "rollout.max_tokens=0: must be at least 1"),
        ("overrides: {data.train_path: /no/such}", "data.train_path='/no/such': must be a file"),
        ("overrides: {objective.name: rloo}", "rollout.stop_at_marker=True: objective=rloo reads"),
        ("overrides: {rollout: {max_tokens: 24}}", "rollout={'max_tokens': 24}: is a section of settings"),
        ("overrides: {model.seed: 3}", "model.seed=3: is the same in all stages"),
        ("overrides: {exp_manager.name: other}", "exp_manager.name='other': is the same in all stages"),
        ("overrides: {rollout.vllm.num_servers: 2}", "rollout.vllm.num_servers=2: is the same in all stages"),
        ("overrides: {trainer.jepo.until.metric: a}", "trainer.jepo.until.metric='a': is the stage's end. Write until"),
        ("until: {metric: val_rollouts/accuracy}", "trainer.jepo.until.metric='val_rollouts/accuracy': has no bound"),
        ("until: {at_most: 1}", "trainer.jepo.until.metric=None: there is a bound without a metric"),
    ],
)
def test_what_is_wrong_in_a_stage_is_said_with_its_number(second, beginning):
    line = error_of(f"stages=[{{max_steps: 1}}, {{max_steps: 1, {second}}}]")
    assert line.startswith(f"stage 2: {beginning}")


@pytest.mark.parametrize(
    ("stages", "beginning"),
    [
        ("[{overrides: {}}]", "stages[0].max_steps: has no default"),
        ("[{max_steps: 1}, {max_steps: 0}]", "stages[1].max_steps=0: must be at least 1"),
        ("[{max_steps: 1, until: {metric: accuracy}}]", "stages[0].until.metric='accuracy': must be a metric that"),
        ("[{max_stepz: 1}]", "stages: no stage has max_stepz. Give max_steps"),
    ],
)
def test_a_stage_that_is_none_is_said_by_its_key(stages, beginning):
    assert error_of(f"stages={stages}").startswith(beginning)


def test_a_metric_that_is_not_measured_on_the_way_ends_nothing():
    until = ["trainer.jepo.until.metric=val_rollouts/accuracy", "trainer.jepo.until.at_least=1"]
    assert "val_check_interval is 0" in error_of(*until, "trainer.jepo.val_check_interval=0")
    unread = ["data=jsonl", "data.train_path=/dev/null", "data.validation_path=null"]
    assert "nothing is validated on" in error_of(*until, *unread)


def test_stages_alone_are_a_run():
    check(settings("warmup.max_steps=0", "trainer.jepo.max_steps=0", "stages=[{max_steps: 1}]"), 1)


@pytest.mark.parametrize(
    ("at_least", "at_most", "met"),
    [(0.6, None, [0.6, 0.9]), (None, 0.6, [0.1, 0.6]), (0.6, 0.6, [0.6]), (0.7, 0.8, [])],
)
def test_a_threshold_is_met_at_its_bound_and_beyond(at_least, at_most, met):
    until = UntilConfig(metric="m", at_least=at_least, at_most=at_most)
    assert [value for value in (0.1, 0.6, 0.9) if until.is_met({"m": value, "other": 0.6})] == met
    assert not until.is_met({"other": 0.6}) and not until.is_met({"m": None})


def test_the_metrics_of_a_step_are_read_back_and_half_a_line_is_none(tmp_path):
    assert metrics_of(tmp_path, 1) == {}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "m": 0.1}\n{"step": 2, "m": null}\n{"step": 3, "m"')
    assert [metrics_of(tmp_path, step).get("m", "none") for step in (1, 2, 3)] == [0.1, None, "none"]


# ---- which part is next


@pytest.fixture
def next_of(monkeypatch, tmp_path):
    """(start, folders) of `those_to_run` where these parts have a checkpoint, by the folders' names alone."""
    parts = parts_of(settings(TWO))

    def look(*begun: str) -> tuple[str | None, list[str]]:
        def newest(checkpoints: Path) -> Path | None:
            name = checkpoints.parent.relative_to(tmp_path).as_posix().replace(".", "main")
            return Path(name) if name in begun else None

        monkeypatch.setattr(train, "newest_on_every_rank", newest)
        start, left = train.those_to_run(parts, tmp_path)
        return None if start is None else str(start), [part.folder for part in left]

    return look


def test_a_start_goes_to_the_newest_part_that_has_begun(next_of):
    assert next_of() == (None, ["warmup", "stage_1", "stage_2", ""])
    assert next_of("warmup") == (None, ["warmup", "stage_1", "stage_2", ""])
    assert next_of("warmup", "stage_1") == ("warmup", ["stage_1", "stage_2", ""])
    assert next_of("stage_1", "stage_2") == ("stage_1", ["stage_2", ""])  # what came before may be gone
    assert next_of("warmup", "stage_1", "stage_2", "main") == ("stage_2", [""])


def test_a_part_whose_start_is_gone_is_refused(next_of):
    with pytest.raises(ConfigError, match="has no checkpoint, and a later part of the run started from it"):
        next_of("warmup", "stage_2")


def test_an_evaluation_looks_into_the_newest_stage_first(tmp_path):
    for name in ("stage_1", "stage_10", "stage_2", "stage_old", "warmup"):
        (tmp_path / name).mkdir()
    names = [folder.relative_to(tmp_path).as_posix() for folder in folders_in(tmp_path)]
    assert names == [".", "stage_10", "stage_2", "stage_1", "warmup"]
    assert all(latest_checkpoint(folder / "checkpoints") is None for folder in folders_in(tmp_path))
