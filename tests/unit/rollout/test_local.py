"""What a run gives the servers that it starts, without starting one."""

import pytest

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.schema import VLLMConfig
from nemo_jepo.rollout.vllm import local
from nemo_jepo.rollout.vllm.server import KEY_VARIABLE

TRAINERS_OWN = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}


@pytest.fixture
def environments(monkeypatch, tmp_path):
    """Starts the servers of these settings behind this many trainers; returns the environment of each."""

    def environments_of(settings, trainers):
        found = []
        monkeypatch.setattr(local.subprocess, "Popen", lambda command, env, **pipes: found.append(env))
        monkeypatch.setattr(local, "vllm_distribution", lambda: ("vllm", "0.32.0"))
        model = local.ServedModel(tmp_path, "bfloat16", 128)
        local.LocalServers(model, settings, "the key", tmp_path, trainers).start()
        return found

    return environments_of


def test_servers_get_nothing_that_is_the_trainers_own(monkeypatch, environments):
    for name, value in TRAINERS_OWN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_HOME", "/models")
    (environment,) = environments(VLLMConfig(num_servers=1), 2)
    assert not set(TRAINERS_OWN) & set(environment)
    assert environment["HF_HOME"] == "/models" and environment[KEY_VARIABLE] == "the key"


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, ["2,3", "4,5"]), ("1,3,5,7,0,2", ["5,7", "0,2"]), ("GPU-a, GPU-b,GPU-c,GPU-d,GPU-e,GPU-f,GPU-g", None)],
)
def test_servers_get_the_gpus_behind_the_trainers_among_those_that_the_run_sees(
    monkeypatch, environments, visible, expected
):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = environments(VLLMConfig(num_servers=2, tensor_parallel_size=2), 2)
    expected = expected or ["GPU-c,GPU-d", "GPU-e,GPU-f"]
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in found] == expected


@pytest.mark.parametrize("visible", ["0,1,2", ""])
def test_too_few_gpus_are_named(monkeypatch, environments, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=.* trainers and servers need 4 or more. Show more"):
        environments(VLLMConfig(num_servers=1, tensor_parallel_size=2), 2)
