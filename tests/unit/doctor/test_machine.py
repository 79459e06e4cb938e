"""GPUs, room, file system and ports of a node."""

import shutil
import socket
from types import SimpleNamespace

import pytest
import torch

from nemo_jepo.config import compose
from nemo_jepo.config.schema import Config
from nemo_jepo.tools.doctor import machine
from nemo_jepo.tools.doctor.findings import BLOCKER, OK, WARNING
from nemo_jepo.tools.doctor.machine import (
    GIB,
    check_cudnn,
    check_disk,
    check_file_system,
    check_gpus,
    check_memory,
    check_ports,
    cudnn_folders,
    existing_parent,
)


def config(*overrides: str) -> Config:
    return compose.resolve(compose.compose("demo", overrides))


@pytest.fixture
def two_gpus(monkeypatch):
    """A node with two GPUs, most of the second one taken."""
    properties = SimpleNamespace(name="NVIDIA H100", total_memory=80 * GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: ((79 * GIB, 10 * GIB)[number], 80 * GIB))
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))


def test_a_taken_gpu_warns_and_a_missing_one_blocks(two_gpus):
    kind, missing, taken = check_gpus(devices=8)
    assert kind.level == OK and kind.text.startswith("2 x NVIDIA H100, 80 GiB") and "NCCL 2.27.5" in kind.text
    assert (missing.level, missing.text) == (BLOCKER, "trainer.devices=8, and this node has 2")
    assert (taken.level, taken.text) == (WARNING, "70 of 80 GiB of GPU 1 are taken")


def test_a_node_without_gpus_is_one_for_gloo():
    (finding,) = check_gpus(devices=2)
    assert finding.level == OK and "gloo" in finding.text


def test_a_run_without_room_on_these_gpus_warns_and_names_the_phase(two_gpus):
    (small,) = check_memory(config())
    assert small.level == OK and "of 80 GiB of a trainer GPU in " in small.text
    shape = (
        "model.hf_config={hidden_size: 8192, num_hidden_layers: 80, intermediate_size: 28672, num_attention_heads: 64}"
    )
    (large,) = check_memory(config(shape))  # 60 billion parameters with their optimizer state on one GPU
    assert large.level == WARNING and "training" in large.text and "nemo-jepo plan" in large.fix
    assert float(large.text.split()[0]) > 12 * 60


def test_memory_is_not_guessed_without_a_gpu():
    assert not list(check_memory(config()))


@pytest.mark.parametrize(("precision", "bytes_each"), [("fp32", 16), ("bf16", 14)])
def test_checkpoints_must_fit_on_the_disk_with_one_to_spare(precision, bytes_each, tmp_path, monkeypatch):
    settings = config(f"trainer.precision={precision}", "trainer.jepo.keep_checkpoints=2")
    needed = 3 * 10**9 * bytes_each
    for free, level in ((needed - 1, BLOCKER), (needed, OK)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        (finding,) = check_disk(tmp_path / "not" / "yet", 10**9, settings)
        assert finding.level == level and f"{needed / GIB:.1f} needed" in finding.text


def test_a_folder_to_be_is_judged_by_the_one_above_it(tmp_path):
    assert existing_parent(tmp_path / "a" / "b") == tmp_path


def test_a_file_system_is_timed_and_left_as_it_was(tmp_path, monkeypatch):
    (finding,) = check_file_system(tmp_path)
    assert finding.text.startswith(f"{tmp_path}: writes ") and not list(tmp_path.iterdir())
    monkeypatch.setattr(machine, "SLOW_BYTES_PER_S", 1e15)
    (slow,) = check_file_system(tmp_path)
    assert slow.level == WARNING


def test_a_file_system_that_cannot_be_written_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "existing_parent", lambda folder: tmp_path / "gone")
    (finding,) = check_file_system(tmp_path)
    assert finding.level == BLOCKER and "cannot be written" in finding.text


def test_a_taken_rendezvous_port_blocks(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        (finding,) = check_ports(config())
    assert finding.level == BLOCKER and "cannot be opened" in finding.text
    (finding,) = check_ports(config())
    assert finding.level == OK


def test_a_rollout_server_that_does_not_answer_warns():
    with socket.socket() as server, socket.socket() as closed:
        server.bind(("127.0.0.1", 0))
        server.listen()
        closed.bind(("127.0.0.1", 0))
        urls = [f"http://127.0.0.1:{s.getsockname()[1]}" for s in (server, closed)]
        good, bad = check_ports(config("rollout=vllm", f"rollout.servers=[{','.join(urls)}]"))
    assert good.level == OK and (bad.level, bad.text.split(" does")[0]) == (WARNING, urls[1])


MAPS = """7f0000000000-7f0000001000 r-xp 00000000 08:01 11 /venv/nvidia/cudnn/lib/libcudnn.so.9
7f0000002000-7f0000003000 r--p 00001000 08:01 11 /venv/nvidia/cudnn/lib/libcudnn.so.9
7f0000004000-7f0000005000 r-xp 00000000 08:01 12 /venv/nvidia/cudnn/lib/libcudnn_graph.so.9
7f0000006000-7f0000007000 rw-p 00000000 00:00 0
7f0000008000-7f0000009000 r-xp 00000000 08:01 13 /venv/torch/lib/libtorch_cuda.so
"""
SYSTEM = "7f000000a000-7f000000b000 r-xp 00000000 08:01 14 /usr/lib/my libs/libcudnn_engines_precompiled.so.9.1\n"


def test_the_folders_of_a_process_that_loaded_cudnn():
    assert cudnn_folders("") == []
    assert cudnn_folders(MAPS) == ["/venv/nvidia/cudnn/lib"]
    assert cudnn_folders(MAPS + SYSTEM) == ["/usr/lib/my libs", "/venv/nvidia/cudnn/lib"]


@pytest.mark.parametrize(("maps", "levels"), [("", []), (MAPS, [OK]), (MAPS + SYSTEM, [BLOCKER])])
def test_parts_of_two_cudnns_block(maps, levels, monkeypatch):
    monkeypatch.setattr(machine.Path, "read_text", lambda path: maps)
    findings = list(check_cudnn())
    assert [finding.level for finding in findings] == levels
    if levels == [BLOCKER]:
        assert "/usr/lib/my libs and /venv/nvidia/cudnn/lib" in findings[0].text
