"""Whole runs through real vLLM servers: they learn as with the embedded sampler, survive deaths, lose no prompt."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nemo_jepo.config import compose
from nemo_jepo.data import PromptStream, load_prompts, load_tokenizer
from tests.support.command_line import ENVIRONMENT, ROOT, command, metrics, run
from tests.support.vllm_processes import SHAPE, alive, descendants, named, needs_vllm, orphaned_memory, wait_until

pytestmark = [needs_vllm, pytest.mark.timeout(600)]

VLLM = [
    "rollout=vllm",
    *SHAPE,
    "rollout.max_tokens=40",
    "trainer.jepo.val_check_interval=0",
    "trainer.jepo.log_rollouts=99",
]
DEMO_UPDATES = 20


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    before = orphaned_memory()
    yield
    wait_until(lambda: not orphaned_memory() - before, seconds=30)


# ---- The demo.


@pytest.fixture(scope="module")
def warm_start(tmp_path_factory) -> Path:
    """The demo's model after its warm-up: it writes chains of thought, most of them wrong."""
    folder = tmp_path_factory.mktemp("demo")
    demo(folder, "warm", 1, "trainer.jepo.max_steps=1", "trainer.jepo.val_at_start=false")
    checkpoints = folder / "warm" / "warmup" / "checkpoints"
    return checkpoints / (checkpoints / "latest").read_text()


def demo(folder: Path, name: str, num_ranks: int, *overrides: str) -> list[dict[str, Any]]:
    """Its validations: the lines of metrics.jsonl that have an accuracy."""
    train = ["-m", "nemo_jepo.cli", "train", "--config-name=demo", f"exp_manager.exp_dir={folder}"]
    train += [f"exp_manager.name={name}", f"trainer.devices={num_ranks}", "data.num_validation_prompts=128", *overrides]
    launch(num_ranks, train)
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "val_rollouts/accuracy" in line]


def launch(num_ranks: int, arguments: list[str]) -> None:
    """`python *arguments` once a rank."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks), "--no-python", sys.executable]
    launched = [*torchrun, *arguments] if num_ranks > 1 else arguments
    done = subprocess.run([sys.executable, *launched], env=ENVIRONMENT, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]


def gain(validations: list[dict[str, Any]]) -> float:
    return validations[-1]["val_rollouts/accuracy"] - validations[0]["val_rollouts/accuracy"]


@pytest.fixture(scope="module")
def jepo_stage(warm_start) -> list[str]:
    start = f"pretrained_checkpoint.restore_from_path={warm_start}"
    length = ["trainer.jepo.val_check_interval=0", "trainer.jepo.save_interval=0"]
    return [start, "model.hf_config=null", "warmup.max_steps=0", f"trainer.jepo.max_steps={DEMO_UPDATES}", *length]


@pytest.fixture(scope="module")
def embedded_gain(jepo_stage, tmp_path_factory) -> float:
    return gain(demo(tmp_path_factory.mktemp("embedded"), "run", 1, *jepo_stage))


@pytest.mark.parametrize(
    ("num_ranks", "overrides"),
    [
        (2, ["model.tensor_model_parallel_size=2"]),
        (2, ["rollout.vllm.num_servers=2"]),  # two replicas, each feeding one server and drawing from both
    ],
    ids=["one server, TP2 trainer", "two servers, DP2 trainer"],
)
def test_the_demo_learns_through_vllm_as_it_does_embedded(num_ranks, overrides, jepo_stage, embedded_gain, tmp_path):
    validations = demo(tmp_path, "run", num_ranks, "rollout=vllm", *overrides, *jepo_stage)
    assert embedded_gain > 0.2
    # 128 prompts x 4 samples give an accuracy to about 0.03; after 20 updates runs differ by about 0.1.
    assert gain(validations) > 0.2 and abs(gain(validations) - embedded_gain) < 0.25
    assert validations[-1]["val_rollouts/proxy_nll"] < validations[0]["val_rollouts/proxy_nll"]
    assert validations[-1]["val_rollouts/logprob_difference"] < 1e-4


def test_a_trainer_of_two_pipeline_stages_feeds_its_server(tmp_path):
    layout = ["trainer.devices=2", "model.pipeline_model_parallel_size=2", "trainer.jepo.max_steps=3"]
    launch(2, command("train", tmp_path, *VLLM, *layout)[1:])
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3] and lines[-1]["train_optim/grad_norm"] > 0
    assert all(line["train_rollouts/logprob_difference"] < 1e-4 for line in lines)


def test_the_servers_of_an_evaluation_judge_its_answers(tmp_path):
    """A random model, held to a grammar: all it can reply is that an answer is right which the rule calls wrong."""
    template = tmp_path / "chat.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    servers = [f"+rollout.vllm.engine_args.{name}" for name in (f"chat_template={template}", "max_model_len=200")]
    votes = ["correct=Right", "wrong=Wrong", "prompt='{reference_answer} or {answer}?'", "max_tokens=8"]
    judge = [f"evaluation.judge.{setting}" for setting in ("url=rollout", *votes)]
    judge.append("+evaluation.judge.extra_body.structured_outputs.choice=[Right]")
    prompts = ["data.arithmetic.num_validation=24", "data.num_validation_prompts=24"]
    found = json.loads(run("evaluate", tmp_path, *VLLM, *servers, *prompts, *judge).stdout)
    assert found["judge_asked_rate"] > 0 and found["judge_faults"] == 0 and found["judge_correct_rate"] == 1
    assert found["combined_accuracy"] == pytest.approx(found["accuracy"] + found["judge_asked_rate"])
    assert not list(tmp_path.rglob("judge_verdicts.jsonl"))


# ---- Deaths and interruptions.


@contextmanager
def running(folder: Path, *overrides: str) -> Iterator["subprocess.Popen[str]"]:
    with (folder / "console.log").open("a") as log:
        run = subprocess.Popen(command("train", folder, *VLLM, *overrides), env=ENVIRONMENT, stdout=log, stderr=log)
    try:
        yield run
    finally:
        run.kill()
        run.wait()


def finish(run: "subprocess.Popen[str]", folder: Path) -> int:
    try:
        return run.wait(timeout=240)
    except subprocess.TimeoutExpired:
        pytest.fail(f"it did not end:\n{console(folder)}")


def reach(run: "subprocess.Popen[str]", folder: Path, num_steps: int) -> None:
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


def assert_every_prompt_was_trained_on_once_and_in_order(folder: Path, num_steps: int) -> None:
    config = compose.resolve(compose.compose("config", [], folder / "run"))
    prompts = load_prompts(config.data, "train", load_tokenizer(folder / "run" / "tokenizer")).prompts
    stream = PromptStream(prompts, config.trainer.jepo.num_prompts_per_step, config.data.shuffle, config.data.seed)
    siblings = range(config.trainer.jepo.num_generations_per_prompt)
    for step in range(1, num_steps + 1):
        expected = [(prompt.prompt_id, sample) for prompt in stream.next_batch() for sample in siblings]
        assert sampled_prompts(folder, step) == expected


@pytest.mark.parametrize("victim", ["EngineCor", "api_server"])
def test_a_run_whose_only_server_is_killed_saves_and_goes_on_when_started_again(victim, tmp_path):
    with running(tmp_path, "trainer.jepo.max_steps=5000") as run:
        reach(run, tmp_path, 3)
        family = descendants(run.pid)
        os.kill(named(run.pid, victim)[0].pid, signal.SIGKILL)
        assert finish(run, tmp_path) == 75, console(tmp_path)
    wait_until(lambda: not alive(family), seconds=30)
    done = steps_done(tmp_path)
    assert 3 <= done < 5000
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step_{done:06d}"
    with running(tmp_path, f"trainer.jepo.max_steps={done + 3}") as again:
        assert finish(again, tmp_path) == 0, console(tmp_path)
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, done + 4))
    assert_every_prompt_was_trained_on_once_and_in_order(tmp_path, done + 3)


def test_a_run_outlives_one_of_its_two_servers_which_comes_back_with_the_new_weights(tmp_path):
    with running(tmp_path, "rollout.vllm.num_servers=2", "trainer.jepo.max_steps=5000") as run:
        reach(run, tmp_path, 3)
        killed_at = steps_done(tmp_path)
        os.kill(named(run.pid, "api_server")[0].pid, signal.SIGKILL)
        wait_until(lambda: any(line["train_rollouts/servers"] == 1 for line in metrics(tmp_path)[killed_at - 1 :]), 200)
        wait_until(lambda: metrics(tmp_path)[-1]["train_rollouts/servers"] == 2, seconds=300)
        run.send_signal(signal.SIGTERM)
        assert finish(run, tmp_path) == 75, console(tmp_path)
    lines = metrics(tmp_path)
    assert all(line["train_rollouts/failed_samples"] == 0 for line in lines)
    assert all(line["train_rollouts/logprob_difference"] < 1e-4 for line in lines)
    assert_every_prompt_was_trained_on_once_and_in_order(tmp_path, len(lines))


def staleness(folder: Path) -> float:
    """The most of any step so far, in optimizer steps."""
    return max(line["train_rollouts/staleness_mean"] for line in metrics(folder))


def test_sampling_ahead_is_bounded_and_an_interruption_neither_loses_nor_repeats_a_prompt(tmp_path):
    ahead = ["rollout.max_staleness=2", "objective.importance_sampling=sequence_truncated"]
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
    # At the start nothing has been sampled yet, and what was begun before the interruption is not used.
    assert [lines[start]["train_rollouts/staleness_mean"] for start in (0, done)] == [0, 0]
    assert_every_prompt_was_trained_on_once_and_in_order(tmp_path, done + 4)
