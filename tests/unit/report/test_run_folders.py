"""What the report reads of run folders, and what it says of broken ones."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from nemo_jepo.config.errors import DataError
from nemo_jepo.tools.report.results import read_results
from nemo_jepo.tools.report.runs import evenly, names_of, read_run, read_runs
from tests.support.report_folders import POLICY, change_line, write_run


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "runs" / "mine")


def complaint(folder):
    """The one line that a user sees."""
    with pytest.raises(DataError) as raised:
        read_runs([folder], 40)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_metric_of_an_older_run_has_its_name_of_today(folder, tmp_path):
    """A run that was resumed by a newer version is one curve; so is a set of runs in results.parquet."""
    older, newer = {"step": 1, "train_optim/loss": 0.5}, {"step": 2, "train_optim/surrogate_loss": 0.25}
    (folder / "metrics.jsonl").write_text(f"{json.dumps(older)}\n{json.dumps(newer)}\n")
    assert read_run(folder, "mine", 40).metrics == {"train_optim/surrogate_loss": [0.5, 0.25]}
    rows = {"step": [1, 2], "metric": ["train_optim/loss", "train_optim/surrogate_loss"], "value": [0.5, 0.25]}
    same = {"experiment": ["set"] * 2, "regime": ["verifiable"] * 2, "arm": ["jepo"] * 2, "seed": [1, 1]}
    pyarrow.parquet.write_table(pyarrow.table(same | rows), tmp_path / "results.parquet")
    (found,) = read_results(tmp_path / "results.parquet")
    assert found.arms["jepo"] == {"train_optim/surrogate_loss": {1: {1: 0.5, 2: 0.25}}}


def test_a_run_is_its_settings_metrics_and_rollouts(folder):
    run = read_run(folder, "mine", 40)
    assert run.settings == {"objective.name": "jepo", "trainer.jepo.max_steps": 3, "kl.beta": 0.001}
    assert run.steps == [1, 2, 3]
    assert run.metrics["train_rollouts/bound"] == [-3.0, -2.0, -1.0]
    assert run.metrics["val_rollouts/proxy_nll"] == [None, 2.0, None]
    assert [(step.phase, step.step) for step in run.rollouts] == [
        ("training", 1),
        ("training", 2),
        ("training", 3),
        ("validation", 2),
    ]
    valid, invalid = run.rollouts[0].samples
    assert (valid["prompt_id"], valid["sample"], valid["status"], valid["marker"]) == (41, 0, "valid", [4, 5])
    assert valid["answer_logprob"] == pytest.approx(sum(POLICY[0][4:]))
    assert (valid["advantage"], valid["policy_weight"], valid["answer_weight"]) == (0.25, 0.25 / 8, 0.125)
    assert (invalid["status"], invalid["marker"], invalid["answer_logprob"]) == ("no marker", None, None)
    assert valid["text"] is None and run.rollouts[3].samples[0]["text"] == "own text of step 2"


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"failed": True}, "failed"),
        ({"marker": [1, 3], "misaligned": True}, "marker ends inside a token"),
        ({"marker": [1, 3]}, "chain too short"),
    ],
)
def test_an_invalid_sample_says_why(folder, fields, status):
    change_line(folder / "rollouts" / "step_000002.jsonl", 2, **fields)
    assert read_run(folder, "mine", 40).rollouts[1].samples[1]["status"] == status


def test_a_line_that_is_still_being_written_is_passed_over(folder):
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "train_rollo')
    assert read_run(folder, "mine", 40).steps == [1, 2, 3]


def test_a_run_without_rollouts_is_whole(folder):
    for path in (folder / "rollouts").iterdir():
        path.unlink()
    (folder / "rollouts").rmdir()
    assert read_run(folder, "mine", 40).rollouts == []


def test_of_many_steps_evenly_spaced_ones_are_kept_and_the_rest_is_counted(tmp_path):
    run = read_run(write_run(tmp_path / "long", num_steps=10), "long", 3)
    assert [step.step for step in run.rollouts] == [1, 6, 10, 2, 6, 10]
    assert run.num_left_out == 10 + 5 - 6


@pytest.mark.parametrize("count", range(12))
def test_evenly_keeps_the_last_and_the_first_of_more_than_one(count):
    kept = evenly(range(10), count)
    assert len(kept) == min(count, 10) and kept == sorted(set(kept))
    assert kept[-1:] == ([9] if count else []) and (count < 2 or kept[0] == 0)


def test_a_folder_that_is_no_run_says_what_is_missing(tmp_path, folder):
    assert complaint(tmp_path / "none") == f"{tmp_path / 'none'}: no such folder. Give a run folder, <exp_dir>/<name>."
    assert "no config.yaml" in complaint(folder.parent)
    (folder / "metrics.jsonl").rename(folder / "other")
    assert "no metrics.jsonl" in complaint(folder)


def test_the_folder_of_a_run_that_only_warmed_up_says_where_that_is(tmp_path):
    write_run(tmp_path / "young" / "warmup")
    assert complaint(tmp_path / "young").endswith(f"Its warm-up is {tmp_path / 'young' / 'warmup'}.")


def test_settings_that_are_no_yaml_or_no_settings_are_named(folder):
    for text in ("a: [1, 2", "- 1\n- 2", "!!python/object:os.system {}"):
        (folder / "config.yaml").write_text(text)
        assert complaint(folder).startswith(f"{folder / 'config.yaml'}: ")


@pytest.mark.parametrize("line", ["{", "[]", "null", "3", '{"step": "two"}', '{"step": 2, "a": NaN}', '{"a": 1}'])
def test_a_broken_line_of_metrics_is_named(folder, line):
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], line, lines[2]]) + "\n")
    assert complaint(folder).startswith(f"{file}, line 2: ")


def test_metrics_without_a_step_are_refused(folder):
    (folder / "metrics.jsonl").write_text("")
    assert "no step yet" in complaint(folder)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tokens": ...}, "no field 'tokens'"),
        ({"tokens": ["a"]}, "do not agree"),
        ({"prompt_length": -1}, "do not agree"),
        ({"policy_logprobs": [0.0]}, "do not agree"),
        ({"policy_logprobs": ["x"] * 6}, "is no number"),
        ({"generation_logprobs": [0.0] * 99}, "do not agree"),
        ({"marker": [0, 3]}, "not in the chain"),
        ({"marker": 3}, "not a record"),
        ({"advantage": "<b>"}, "is no number"),
        ({"advantage": 10**400}, "not a record"),
        ({"token_ids": None}, "not a record"),
    ],
)
def test_a_broken_rollout_is_named_by_file_and_line(folder, fields, reason):
    file = folder / "rollouts" / "step_000002.jsonl"
    change_line(file, 1, **fields)
    assert complaint(folder).startswith(f"{file}, line 1: ") and reason in complaint(folder)


def test_a_value_that_was_not_finite_is_none(folder):
    change_line(folder / "rollouts" / "step_000001.jsonl", 1, policy_logprobs=[None, -1.0, -1.0, -1.0, -1.0, None])
    sample = read_run(folder, "mine", 40).rollouts[0].samples[0]
    assert sample["policy_logprobs"][0] is None and sample["answer_logprob"] is None
    json.dumps(sample, allow_nan=False)


@pytest.mark.parametrize(
    "names",
    [[], ["run"], ["one", "two"], ["a/run", "b/run"], ["jepo/seed_1", "rloo/seed_2"], ["run", "run/warmup"]],
)
def test_a_run_is_called_by_its_path_below_what_holds_them_all(names, tmp_path):
    assert names_of([tmp_path / name for name in names]) == names
    assert names_of([tmp_path / "deeper" / name / "" for name in names]) == names


def test_a_run_that_is_given_twice_is_refused(tmp_path):
    with pytest.raises(DataError, match="given twice"):
        names_of([tmp_path / "a", tmp_path / "b" / ".." / "a"])
