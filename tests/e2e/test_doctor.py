"""`nemo-jepo doctor`, alone and on two ranks."""

import json
import subprocess

import pytest

from nemo_jepo.tools.doctor.findings import BLOCKER
from tests.support import fork_server
from tests.support.command_line import ENVIRONMENT, ROOT
from tests.support.ranks import run_ranks

SMALL = ["data.arithmetic.num_train=80", "tokenizer.train_vocab_size=270"]


def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    doctor = ["-m", "nemo_jepo.cli", "doctor", "--config-name", "demo", *SMALL, *arguments]
    return fork_server.run(doctor, environment=ENVIRONMENT, cwd=ROOT)


@pytest.mark.quick
def test_a_healthy_machine_ends_with_0_and_a_blocker_with_2(tmp_path):
    done = doctor("--json", f"exp_manager.exp_dir={tmp_path}")
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["blocked"] is False and not list(tmp_path.iterdir())
    subjects = [finding["subject"] for finding in report["findings"]]
    assert {"versions", "settings", "GPU", "model", "disk", "file system", "tokenizer", "marker"} <= set(subjects)
    done = doctor("rollout.top_p=0.5", f"exp_manager.exp_dir={tmp_path}")
    assert done.returncode == 2 and "rollout.top_p=0.5" in done.stdout


@pytest.mark.quick
def test_an_unknown_key_is_a_finding_too():
    done = doctor("--json", "model.tensor_parallel=2")
    assert done.returncode == 2
    (finding,) = [f for f in json.loads(done.stdout)["findings"] if f["level"] == BLOCKER]
    assert finding["text"] == "model.tensor_parallel=2: no such key" and "tensor_model_parallel" in finding["fix"]


def test_two_ranks_time_their_groups_and_see_one_folder(tmp_path):
    layout = ["trainer.devices=2", "model.tensor_model_parallel_size=2", f"exp_manager.exp_dir={tmp_path}"]
    output = run_ranks(2, ["-m", "nemo_jepo.cli", "doctor", "--json", "--config-name", "demo", *SMALL, *layout])
    report = json.loads(output[output.index("{\n") : output.rindex("}") + 1])
    texts = [finding["text"] for finding in report["findings"]]
    assert any(text.startswith("tensor groups of 2: ") and text.endswith("GB/s") for text in texts)
    assert f"{tmp_path} is the same on all nodes" in texts
    assert not list(tmp_path.iterdir())
