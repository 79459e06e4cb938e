"""A run that is killed, at any moment, and started again ends as if nothing had happened: bit for bit."""

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from nemo_jepo.checkpoint.format import latest_checkpoint
from nemo_jepo.config.schema import AnswerConfig
from nemo_jepo.data.splice import Splicer
from tests.support import fork_server
from tests.support.command_line import ENVIRONMENT, command, metrics, run, run_truly
from tests.support.interrupted import bits, hears_signals, num_lines, popen, start, stop_when, unfinished


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_truly("train", folder)
    return folder


@pytest.mark.parametrize("background", [False, True], ids=["waiting for saves", "saving in the background"])
def test_a_run_killed_in_a_step_and_in_a_save_ends_as_if_never_interrupted(background, uninterrupted, tmp_path):
    checkpoints, setting = tmp_path / "run" / "checkpoints", f"trainer.jepo.async_save={background}"
    # In the middle of step 4: step 3 is on record, nothing after it.
    code = stop_when(lambda: num_lines(tmp_path) == 3, signal.SIGKILL, tmp_path, setting, truly=not background)
    assert code == -signal.SIGKILL
    assert num_lines(tmp_path) < 6
    newest = latest_checkpoint(checkpoints)
    assert newest == checkpoints / "step_000002" or (background and newest is None)  # still being written
    # In the middle of the save after step 4.
    assert stop_when(lambda: bool(unfinished(checkpoints, 4)), signal.SIGKILL, tmp_path, setting) == -signal.SIGKILL
    assert not (checkpoints / "step_000004").exists()
    assert (checkpoints / "latest").read_text() == "step_000002"
    (run if background else run_truly)("train", tmp_path, setting)
    assert metrics(tmp_path) == metrics(uninterrupted)
    assert {path.name for path in checkpoints.iterdir()} == {"step_000004", "step_000006", "latest"}
    assert bits(tmp_path) == bits(uninterrupted)


@pytest.mark.parametrize(
    "how, setting",
    [(signal.SIGTERM, "trainer.jepo.async_save=true"), (signal.SIGUSR1, "trainer.jepo.async_save=false")],
)
def test_a_signal_to_all_processes_saves_exits_75_and_the_next_start_goes_on(how, setting, uninterrupted, tmp_path):
    assert stop_when(lambda: num_lines(tmp_path) == 3, how, tmp_path, setting, whole_group=True) == 75
    steps = num_lines(tmp_path)
    assert 3 <= steps < 6  # the step is over whose line was seen, or the next one
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step_{steps:06d}"
    run("train", tmp_path)
    assert metrics(tmp_path) == metrics(uninterrupted)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize(
    ("name", "truly", "delay_s"), [("train", True, 0), ("evaluate", True, 1), ("train", False, 0.3)]
)
def test_a_signal_during_the_start_ends_it_with_75_and_one_line(name, truly, delay_s, how, tmp_path):
    """As soon as it hears; in the middle of importing torch; while the model is built or the first steps are made."""
    with open(tmp_path / "output", "w+") as output:
        process = start(name, tmp_path, truly=truly, output=output)
        try:
            while not hears_signals(process.pid):
                assert process.poll() is None
                time.sleep(0.001)
            time.sleep(delay_s)
            process.send_signal(how)
            assert process.wait(timeout=200) == 75
        finally:
            process.kill()
        said = (tmp_path / "output").read_text()
    assert "Traceback" not in said
    if not num_lines(tmp_path):
        assert said.splitlines()[-1].startswith("interrupted") and said.count("interrupted") == 1


def test_ctrl_c_during_the_imports_of_any_other_command_is_one_line(tmp_path):
    with open(tmp_path / "output", "w+") as output:
        program = [str(Path(sys.executable).parent / "nemo-jepo"), "export", "checkpoint", "folder"]
        process = popen(program, stdout=output, stderr=output)
        try:
            time.sleep(1)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=200) == 130
        finally:
            process.kill()
    assert (tmp_path / "output").read_text() == "interrupted\n"


def test_a_run_told_to_stop_in_a_validation_saves_its_step_and_validates_it_at_the_next_start(tmp_path):
    """Step 3 is no multiple of the save interval; its own metrics are on record only together with the validation's."""
    settings = ["data.num_validation_prompts=100", "data.arithmetic.num_validation=100", "rollout.batch_size=4"]
    settings.append("trainer.jepo.max_steps=4")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run("train", whole, *settings)
    # The step's rollouts are written at its end, right before the validation.
    sampled = stopped / "run" / "rollouts" / "step_000003.jsonl"
    assert stop_when(sampled.exists, signal.SIGTERM, stopped, *settings) == 75
    assert num_lines(stopped) == 2
    assert (stopped / "run" / "checkpoints" / "latest").read_text() == "step_000003"
    run("train", stopped, *settings)
    assert metrics(stopped) == metrics(whole)
    assert not (stopped / "run" / "unreported.json").exists()


def test_a_run_that_replaces_prompts_and_is_killed_ends_as_if_never_interrupted(tmp_path):
    """The position in the data, the numbers that name batches and the mean spread are those of the last checkpoint."""
    settings = ["refill.max_batches=3", "refill.ratio=1.0", "refill.statistics_from=1", "refill.first_step=2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run("train", whole, *settings)
    assert max(line["train_rollouts/refill_rounds"] for line in metrics(whole)) > 0
    assert stop_when(lambda: num_lines(killed) == 3, signal.SIGKILL, killed, *settings) == -signal.SIGKILL
    run("train", killed, *settings)
    assert metrics(killed) == metrics(whole)
    assert bits(killed) == bits(whole)


def test_kept_metrics_of_a_step_whose_checkpoint_was_never_written_are_dropped(tmp_path):
    """A run killed between the two: the step is made again, and a later start at that step reports it once."""
    run("train", tmp_path, "trainer.jepo.max_steps=2")
    kept = tmp_path / "run" / "unreported.json"
    kept.write_text(json.dumps({"step": 3, "metrics": {"train_optim/surrogate_loss": 1.0}}))
    for steps in (3, 4):
        run("train", tmp_path, f"trainer.jepo.max_steps={steps}")
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4]
    assert not kept.exists()


def test_the_uninterrupted_run_really_trained(uninterrupted):
    lines = metrics(uninterrupted)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["train_optim/grad_norm"] > 0 for line in lines)
    assert any(line["train_rollouts/advantage_std"] > 0 for line in lines)
    assert lines[0]["train_rollouts/kl"] == 0  # the policy is still the reference policy
    assert lines[5]["train_rollouts/kl"] != 0
    assert all(line["train_rollouts/logprob_difference"] < 1e-5 for line in lines)
    assert "val_rollouts/proxy_nll" in lines[2]


def test_a_finished_run_is_left_alone(uninterrupted):
    before = metrics(uninterrupted)
    marker = uninterrupted / "run" / "checkpoints" / "step_000006" / "complete.json"
    written = os.stat(marker).st_mtime_ns
    run("train", uninterrupted)
    assert metrics(uninterrupted) == before
    assert os.stat(marker).st_mtime_ns == written


def test_a_run_that_may_not_resume_refuses_a_folder_with_a_checkpoint(uninterrupted):
    before = metrics(uninterrupted)
    for steps in (6, 9):  # the run is finished, or could go on
        changes = ["exp_manager.resume_if_exists=false", f"trainer.jepo.max_steps={steps}"]
        line = run("train", uninterrupted, *changes, expect=2).stderr.strip().splitlines()[-1]
        assert "exp_manager.name='run'" in line and "step_000006" in line
    assert metrics(uninterrupted) == before


def test_a_run_refuses_the_state_of_another_kind_of_optimizer(uninterrupted):
    before = metrics(uninterrupted)
    changes = ["model.optim.distributed=false", "trainer.jepo.max_steps=9"]
    line = run("train", uninterrupted, *changes, expect=2).stderr.strip().splitlines()[-1]
    assert line.startswith("model.optim.distributed=False: ") and "step_000006 holds the state of a distributed" in line
    assert metrics(uninterrupted) == before


def test_only_the_newest_checkpoints_are_kept_and_each_knows_its_model(uninterrupted):
    folders = sorted((uninterrupted / "run" / "checkpoints").glob("step_*"))
    assert [folder.name for folder in folders] == ["step_000004", "step_000006"]
    config = json.loads((folders[-1] / "config.json").read_text())
    assert (config["model_type"], config["hidden_size"]) == ("llama", 32)
    assert (folders[-1] / "tokenizer.json").exists()


def assert_no_chain_scores_are_exact(records: Path, model: PreTrainedModel, folder: Path) -> None:
    """The records' l0, and the gain of valid samples, are those of transformers over each sequence alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    splicer = Splicer(tokenizer, AnswerConfig(marker="e"))

    def logprob(token_ids: Sequence[int], num_answer_tokens: int) -> float:
        scores = model(torch.tensor([token_ids])).logits[0, :-1].double().log_softmax(-1)
        own = scores.gather(-1, torch.tensor(token_ids[1:]).unsqueeze(-1))
        return own[len(own) - num_answer_tokens :].sum().item()

    for line in records.read_text().splitlines():
        record = json.loads(line)
        answer = splicer.answer_ids(record["reference_answer"])
        marker = tokenizer.encode("E", add_special_tokens=False)
        prompt = record["token_ids"][: record["prompt_length"]]
        no_chain = logprob([*prompt, *marker, *answer], len(answer))
        assert record["no_chain_logprob"] == pytest.approx(no_chain, abs=1e-4)
        behind_chain = logprob(record["token_ids"], len(answer)) - no_chain if record["valid"] else None
        assert record["chain_gain"] == (None if behind_chain is None else pytest.approx(behind_chain, abs=1e-4))


def test_an_exported_checkpoint_is_a_hugging_face_model_with_the_same_metrics(uninterrupted, tmp_path):
    checkpoint, folder = uninterrupted / "run" / "checkpoints" / "step_000006", tmp_path / "exported"
    arguments = ["-m", "nemo_jepo.cli", "export", str(checkpoint), str(folder)]
    assert fork_server.run(arguments, environment=ENVIRONMENT).returncode == 0
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32 and AutoTokenizer.from_pretrained(folder).eos_token_id is not None
    found = json.loads(run("evaluate", tmp_path, f"--model={folder}").stdout)
    assert found["model"] == str(folder)
    last = metrics(uninterrupted)[-1]
    for name in ("proxy_nll", "marker_rate", "cot_tokens_mean", "no_chain_nll", "chain_gain"):
        assert found[name] == pytest.approx(last[f"val_rollouts/{name}"], rel=1e-6)
    assert_no_chain_scores_are_exact(uninterrupted / "run" / "rollouts" / "validation_000006.jsonl", model, folder)
    again = fork_server.run(arguments, environment=ENVIRONMENT)
    assert again.returncode == 2 and "exists" in again.stderr.strip().splitlines()[-1]


def test_evaluate_prints_one_json_object_of_the_newest_checkpoint(uninterrupted):
    found = json.loads(run_truly("evaluate", uninterrupted).stdout)
    last = metrics(uninterrupted)[-1]
    assert found["model"].endswith("step_000006")
    for name in ("accuracy", "proxy_nll", "marker_rate", "cot_tokens_mean"):
        assert found[name] == pytest.approx(last[f"val_rollouts/{name}"], rel=1e-6)


ON_A_FULL_DISK = """
import resource, sys
from nemo_jepo.cli import main

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.exit(main())
"""


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_is_full_ends_the_run_with_one_line_and_the_older_checkpoint_stays(background, tmp_path):
    """The largest file that the second start may write is too small for weights."""
    saving = f"trainer.jepo.async_save={background}"
    run("train", tmp_path, "trainer.jepo.max_steps=2")
    _, _, *arguments = command("train", tmp_path, saving)
    full = fork_server.run(["-c", ON_A_FULL_DISK, *arguments], environment=ENVIRONMENT)
    assert full.returncode == 1, full.stderr[-3000:]
    last = full.stderr.strip().splitlines()[-1]
    assert last.startswith("a checkpoint could not be written (") and "Older checkpoints are whole" in last
    assert "Traceback" not in full.stderr
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").name == "step_000002"
