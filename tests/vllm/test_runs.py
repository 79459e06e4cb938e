"""Whole runs through real vLLM servers: they feed them, survive deaths, lose no prompt."""

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nemo_jepo.config import compose
from nemo_jepo.data.dataset import load_prompts
from nemo_jepo.data.stream import Epochs, PromptStream
from nemo_jepo.data.tokenizer import load_tokenizer
from tests.support import fork_server
from tests.support.command_line import ENVIRONMENT, command, metrics, run
from tests.support.ranks import run_ranks
from tests.support.vllm_processes import SHAPE, alive, descendants, named, needs_vllm, wait_until

pytestmark = [needs_vllm, pytest.mark.timeout(900)]


# ---- Short runs through the shared servers.

SHORT = ["rollout.max_tokens=40", "trainer.jepo.val_check_interval=0", "trainer.jepo.log_rollouts=99"]


@pytest.mark.parametrize(
    ("num_servers", "layout"),
    [
        (1, "model.tensor_model_parallel_size=2"),
        (1, "model.pipeline_model_parallel_size=2"),
        (2, "model.tensor_model_parallel_size=1"),  # two replicas, each feeding one server and drawing from both
    ],
    ids=["TP2", "PP2", "DP2"],
)
def test_every_layout_of_a_trainer_feeds_its_servers(num_servers, layout, servers, tmp_path):
    """After every update they sample with the trainer's weights."""
    steps = ["trainer.devices=2", "trainer.jepo.max_steps=3"]
    run_ranks(2, command("train", tmp_path, *SHORT, *servers.settings(num_servers), *steps, layout))
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3] and lines[-1]["train_optim/grad_norm"] > 0
    assert all(line["train_rollouts/servers"] == num_servers for line in lines)
    assert all(line["train_rollouts/logprob_difference"] < 1e-4 for line in lines)


def test_the_servers_of_an_evaluation_judge_its_answers(servers, tmp_path):
    """A random model, held to a grammar: all it can reply is that an answer is right which the verifier calls wrong."""
    votes = ["correct=Right", "wrong=Wrong", "prompt='{reference_answer} or {answer}?'", "max_tokens=8"]
    judge = [f"evaluation.judge.{setting}" for setting in ("url=rollout", *votes)]
    judge.append("+evaluation.judge.extra_body.structured_outputs.choice=[Right]")
    prompts = ["data.arithmetic.num_validation=24", "data.num_validation_prompts=24"]
    found = json.loads(run("evaluate", tmp_path, *SHORT, *servers.settings(), *prompts, *judge).stdout)
    assert found["judge_asked_rate"] > 0 and found["judge_faults"] == 0 and found["judge_correct_rate"] == 1
    assert found["combined_accuracy"] == pytest.approx(found["accuracy"] + found["judge_asked_rate"])
    assert not list(tmp_path.rglob("judge_verdicts.jsonl"))


def test_the_servers_of_a_run_reward_its_answers(servers, tmp_path):
    """The same grammar, between two updates: every answer that the rule refuses is rewarded, and no canary is asked."""
    reward = ["objective=rloo", "objective.reward=hybrid", "rollout.stop_at_marker=false", "hybrid.canary_interval=0"]
    reply = ["correct=Right", "wrong=Wrong", "prompt='{reference_answer} or {answer}?'", "max_tokens=8"]
    verifier = [f"hybrid.verifier.{setting}" for setting in ("url=rollout", *reply)]
    verifier.append("+hybrid.verifier.extra_body.structured_outputs.choice=[Right]")
    run("train", tmp_path, *SHORT, *servers.settings(), *reward, *verifier, "trainer.jepo.max_steps=2")
    for line in metrics(tmp_path):
        assert line["train_rollouts/hybrid_asked_rate"] > 0 == line["train_rollouts/hybrid_fault_rate"]
        assert line["train_rollouts/hybrid_reward"] > line["train_rollouts/rule_reward"]


def test_the_servers_of_a_run_score_its_pairs(servers, tmp_path):
    objective = ["objective=dpo", "dpo.unverifiable=score", "trainer.jepo.max_steps=2"]
    reply = ["score_line='Score {score}'", "prompt='{reference_answer} or {answer}?'", "max_tokens=8", "temperature=1"]
    judge = [f"dpo.judge.{setting}" for setting in ("url=rollout", *reply)]
    judge.append("+dpo.judge.extra_body.structured_outputs.choice=[Score 2,Score 7]")
    run("train", tmp_path, *SHORT, *servers.settings(), *objective, *judge)
    for line in metrics(tmp_path):
        assert line["train_rollouts/score_asked_rate"] > 0 == line["train_rollouts/score_fault_rate"]
        assert line["train_rollouts/pair_rate"] > 0


# ---- Deaths and interruptions.


@contextmanager
def running(folder: Path, *overrides: str) -> Iterator[fork_server.Process]:
    with (folder / "console.log").open("a") as log:
        train = command("train", folder, *SHORT, *overrides)
        run = fork_server.start(train, environment=ENVIRONMENT, stdout=log, stderr=log)
    try:
        yield run
    finally:
        run.kill()
        run.wait()


def finish(run: fork_server.Process, folder: Path) -> int:
    try:
        return run.wait(timeout=240)
    except subprocess.TimeoutExpired:
        pytest.fail(f"it did not end:\n{console(folder)}")


def reach(run: fork_server.Process, folder: Path, num_steps: int) -> None:
    wait_until(lambda: steps_done(folder) >= num_steps or run.poll() is not None, seconds=300)
    assert run.poll() is None, console(folder)


def console(folder: Path) -> str:
    return (folder / "console.log").read_text()[-4000:]


def steps_done(folder: Path) -> int:
    file = folder / "run" / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def sampled_prompts(folder: Path, step: int) -> list[tuple[int, int]]:
    """(prompt_id, sample) of every rollout that step trained on."""
    lines = (folder / "run" / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()
    return [(record["prompt_id"], record["sample"]) for record in map(json.loads, lines)]


def assert_every_prompt_was_trained_on_once_and_in_order(folder: Path, num_steps: int, tokenizer: Path) -> None:
    config = compose.resolve(compose.compose("config", [], folder / "run"))
    prompts = load_prompts(config.data, "train", load_tokenizer(tokenizer), config.answer).prompts
    stream = PromptStream(
        prompts,
        config.trainer.jepo.num_prompts_per_step,
        Epochs(len(prompts), config.data.shuffle, config.data.seed),
    )
    siblings = range(config.trainer.jepo.num_generations_per_prompt)
    for step in range(1, num_steps + 1):
        expected = [(prompt.prompt_id, sample) for prompt in stream.next_batch() for sample in siblings]
        assert sampled_prompts(folder, step) == expected


def test_a_run_outlives_a_server_and_when_it_has_none_it_saves_and_goes_on_when_started_again(tmp_path):
    own = ["rollout=vllm", *SHAPE]
    with running(tmp_path, *own, "rollout.vllm.num_servers=2", "trainer.jepo.max_steps=5000") as run:
        reach(run, tmp_path, 3)
        killed_at = steps_done(tmp_path)
        supervisor = named(run.pid, "nemo_jepo.cli")[0]
        family = descendants(supervisor.pid)
        named(supervisor.pid, "api_server")[0].kill()
        wait_until(lambda: not alive(family), seconds=60)
        logs = list((tmp_path / "run" / "servers").glob("*.log"))
        wait_until(lambda: any("the server at http" in log.read_text() for log in logs))
        wait_until(lambda: any(line["train_rollouts/servers"] == 1 for line in metrics(tmp_path)[killed_at - 1 :]), 200)
        wait_until(lambda: metrics(tmp_path)[-1]["train_rollouts/servers"] == 2, seconds=300)  # it came back
        lines = metrics(tmp_path)
        assert all(line["train_rollouts/failed_samples"] == 0 for line in lines)
        family = descendants(run.pid)
        for engine in named(run.pid, "EngineCor"):
            engine.kill()
        assert finish(run, tmp_path) == 75, console(tmp_path)
    wait_until(lambda: not alive(family), seconds=30)
    done = steps_done(tmp_path)
    assert len(lines) <= done < 5000
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step_{done:06d}"
    with running(tmp_path, *own, f"trainer.jepo.max_steps={done + 3}") as again:
        assert finish(again, tmp_path) == 0, console(tmp_path)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, done + 4))
    assert all(line["train_rollouts/logprob_difference"] < 1e-4 for line in lines)
    assert_every_prompt_was_trained_on_once_and_in_order(tmp_path, done + 3, tmp_path / "run" / "tokenizer")


def test_a_run_that_is_killed_while_it_pushes_goes_on_with_the_same_servers(servers, tmp_path):
    """They are not this run's: they outlive it, paused, with half of an update."""
    log, own = servers.alike()[0].log, servers.settings(2)

    def num_pushes() -> int:
        return log.read_text(errors="replace").count("setting pause state to PAUSED_ALL")

    with running(tmp_path, *own, "trainer.jepo.max_steps=1000") as run:
        reach(run, tmp_path, 3)
        before = num_pushes()
        while num_pushes() == before:
            time.sleep(0.002)
        run.kill()
        run.wait()
    num_steps = steps_done(tmp_path) + 3
    with running(tmp_path, *own, f"trainer.jepo.max_steps={num_steps}") as again:
        assert finish(again, tmp_path) == 0, console(tmp_path)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, num_steps + 1))
    assert all(line["train_rollouts/servers"] == 2 for line in lines)
    assert all(line["train_rollouts/logprob_difference"] < 1e-4 for line in lines)
    assert_every_prompt_was_trained_on_once_and_in_order(tmp_path, num_steps, servers.model_folder)


def staleness(folder: Path) -> float:
    """The most of any step so far, in optimizer steps."""
    return max(line["train_rollouts/staleness_mean"] for line in metrics(folder))


def test_sampling_ahead_is_bounded_and_an_interruption_neither_loses_nor_repeats_a_prompt(servers, tmp_path):
    ahead = [*servers.settings(), "rollout.max_staleness=2", "objective.importance_sampling=sequence_truncated"]
    with running(tmp_path, "trainer.jepo.max_steps=1000", *ahead) as run:
        reach(run, tmp_path, 6)
        wait_until(lambda: staleness(tmp_path) > 1, seconds=240)  # it does sample ahead
        run.send_signal(signal.SIGTERM)
        assert finish(run, tmp_path) == 75, console(tmp_path)
    done = steps_done(tmp_path)
    with running(tmp_path, f"trainer.jepo.max_steps={done + 4}", *ahead) as again:
        assert finish(again, tmp_path) == 0, console(tmp_path)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, done + 5))
    assert 1 < staleness(tmp_path) <= 2
    # At the start nothing has been sampled yet, and what was being sampled at the interruption is not used.
    assert [lines[start]["train_rollouts/staleness_mean"] for start in (0, done)] == [0, 0]
    assert_every_prompt_was_trained_on_once_and_in_order(tmp_path, done + 4, servers.model_folder)
