"""A checkpoint brings back everything, in its own layout bit for bit; what is not whole is never taken for one."""

import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_jepo.checkpoint.format import is_checkpoint, latest_checkpoint, whole_checkpoints
from nemo_jepo.checkpoint.writer import load_checkpoint
from nemo_jepo.config.errors import ConfigError
from tests.distributed.checkpoint_jobs import trained
from tests.support.rank_pool import on_ranks

TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
TIED, BF16, PLAIN = {"tied": True}, {"precision": "bf16"}, {"distributed": False}
CHUNKS = PP2 | {"virtual_pipeline_model_parallel_size": 2}
UNEVEN, CP2 = PP2 | {"num_layers_in_first_pipeline_stage": 1}, {"context_parallel_size": 2}
EP2, TP2SP = {"expert_model_parallel_size": 2}, TP2 | {"sequence_parallel": True}
EXPERTS = {"shape": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}}
SAVED: dict[str, tuple[int, dict[str, Any]]] = {  # processes, and the job that saves
    "TP2": (2, {"model": TP2}),
    "DP2": (2, {"model": {}}),
    "PP2 tied": (2, {"model": PP2} | TIED),
    "PP2 in 4 chunks": (2, {"model": CHUNKS}),
    "EP2": (2, {"model": EP2} | EXPERTS),
    "one process": (1, {"model": {}}),
    "bf16": (1, {"model": {}} | BF16),
    "plain optimizer": (1, {"model": {}} | PLAIN),
    "plain optimizer bf16": (1, {"model": {}} | PLAIN | BF16),
}
READ: dict[str, tuple[int, dict[str, Any]]] = {  # who read whose checkpoint and wrote it anew
    "TP2 -> PP2": (2, {"model": PP2}),
    "DP2 -> TP2": (2, {"model": TP2}),
    "TP2 -> PP2 in 4 chunks": (2, {"model": CHUNKS}),
    "TP2 -> 1 layer and 3": (2, {"model": UNEVEN}),
    "DP2 -> CP2": (2, {"model": CP2}),
    "EP2 -> PP2": (2, {"model": PP2} | EXPERTS),
    "EP2 -> TP2": (2, {"model": TP2SP} | EXPERTS),
    "EP2 -> one process": (1, {"model": {}} | EXPERTS),
    "PP2 in 4 chunks -> one process": (1, {"model": {}}),
    "TP2 -> PP2 -> one process": (1, {"model": {}}),
    "DP2 -> one process": (1, {"model": {}}),
    "PP2 tied -> one process": (1, {"model": {}} | TIED),
    "TP2 -> PP2 -> one process -> DP2": (2, {"model": {}}),
}
OTHERS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2 in background": (2, {"model": TP2, "held_rank": 1, "how": "background"}),
    # With a plain optimizer the second replica has nothing to write.
    "DP2 in background": (2, {"model": {}, "held_rank": 0, "how": "background"} | PLAIN),
    "full disk": (1, {"model": {}, "how": "full_disk"}),
    "kept": (1, {"model": {}, "how": "save", "steps": [1, 2, 3, 4], "dies_at": 5}),
}
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def folder_of(root: Path, name: str) -> Path:
    return root / f"{name} saves"


@functools.cache
def reports(root: Path, name: str) -> list[State]:
    """A job's state by rank; its checkpoints lie in folder_of(root, name)."""
    world_size, job = (SAVED | READ | OTHERS)[name]
    writer, arrow, _ = name.rpartition(" -> ")
    if arrow:
        reports(root, writer)
        job = job | {"resume": str(folder_of(root, writer) / "step_000002")}
    return on_ranks(world_size, trained, job | {job.get("how", "save"): str(folder_of(root, name))})


def report(root: Path, name: str) -> State:
    return reports(root, name)[0]


@pytest.mark.parametrize("name", SAVED)
def test_resuming_gives_the_state_and_the_next_update_bit_for_bit(name, root):
    uninterrupted = reports(root, name)
    world_size, job = SAVED[name]
    again = on_ranks(world_size, trained, job | {"resume": str(folder_of(root, name) / "step_000002")})
    for before, resumed in zip(uninterrupted, again, strict=True):
        assert before.keys() == resumed.keys()
        assert any("exp_avg_sq" in part for part in resumed) and resumed["saved/num_steps"] == 2
        different = [part for part in resumed if not torch.equal(resumed[part], before[part])]
        assert not different


def test_the_next_update_does_change_the_state(root):
    state = report(root, "one process")
    for part in ("weight/model.norm.weight", "weight/lm_head.weight", "lr", "num_steps", "adam/0/0/step"):
        assert not torch.equal(state[f"saved/{part}"], state[f"next/{part}"]), part


@pytest.mark.parametrize("name", READ)
def test_another_layout_goes_on_from_the_same_state(name, root):
    """Weights at once bit for bit; loss, gradient norm and weights of the next update within fp32 summation order."""
    original, reader = report(root, name.split(" -> ")[0]), report(root, name)
    for part in original:
        if part.startswith("saved/weight/"):
            assert torch.equal(reader[part], original[part]), part
        elif part.startswith("next/metric/"):
            torch.testing.assert_close(reader[part], original[part], rtol=1e-5, atol=1e-6, msg=part)
        elif part.startswith("next/") and "adam" not in part:
            torch.testing.assert_close(reader[part], original[part], rtol=1e-4, atol=1e-5, msg=part)


@pytest.mark.parametrize("name", ["TP2", "DP2"])
def test_a_save_in_the_background_writes_the_bits_of_the_state_it_was_asked_for(name, root):
    """The job checks when it becomes a checkpoint; meanwhile an update changed the state in place."""
    background = report(root, f"{name} in background")
    assert not torch.equal(background["saved/weight/model.norm.weight"], background["next/weight/model.norm.weight"])
    files = checksums(folder_of(root, f"{name} in background") / "step_000002")
    if name == "TP2":
        report(root, "TP2")
        assert files == checksums(folder_of(root, "TP2") / "step_000002")
    assert len([file for file in files if file.endswith(".distcp")]) == (4 if name == "TP2" else 2)


def checksums(checkpoint: Path) -> dict[str, str]:
    """Of all files but .metadata, in which torch writes the folder's name."""
    checksums = json.loads((checkpoint / "complete.json").read_text())["sha256"]
    del checksums[".metadata"]
    return checksums


def test_the_newest_two_are_kept_and_a_save_that_dies_changes_nothing(root):
    report(root, "kept")
    folder = folder_of(root, "kept")
    assert [path.name for path in whole_checkpoints(folder)] == ["step_000003", "step_000004"]
    assert latest_checkpoint(folder) == folder / "step_000004"
    assert (folder / "latest").read_text() == "step_000004"
    names = {re.sub(r"[0-9a-f]{8}", "*", path.name) for path in folder.iterdir()}
    assert names == {"step_000003", "step_000004", ".step_000005.*.partial", "latest"}


def test_a_background_writer_that_fails_leaves_the_older_checkpoint_the_newest(root):
    """The job checks that the run hears of it."""
    report(root, "full disk")
    folder = folder_of(root, "full disk")
    assert [path.name for path in whole_checkpoints(folder)] == ["step_000001"]
    assert (folder / "latest").read_text() == "step_000001" and not (folder / "step_000002").exists()


@pytest.fixture
def saves(root, tmp_path) -> Path:
    """A folder with steps 3 and 4, to be damaged."""
    report(root, "kept")
    return Path(shutil.copytree(folder_of(root, "kept"), tmp_path / "checkpoints"))


def error_of(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_checkpoint(path, {})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_complete_json_a_folder_is_passed_over(saves):
    (saves / "step_000004" / "complete.json").unlink()
    assert latest_checkpoint(saves) == saves / "step_000003"
    assert "step_000004': has no complete.json" in error_of(saves / "step_000004")


def test_with_half_a_complete_json_a_folder_is_passed_over(saves):
    marker = saves / "step_000004" / "complete.json"
    marker.write_text(marker.read_text()[:-20])
    assert latest_checkpoint(saves) == saves / "step_000003"


@pytest.mark.parametrize("pattern", ["*.distcp", ".metadata", "common.pt", "loop.json", "config.json"])
def test_with_a_truncated_or_missing_file_a_folder_is_passed_over_and_the_file_named(pattern, saves):
    file = next((saves / "step_000004").glob(pattern))
    file.write_bytes(file.read_bytes()[:-1])
    assert latest_checkpoint(saves) == saves / "step_000003"
    assert f"{file.name} is missing or has another size" in error_of(saves / "step_000004")
    file.unlink()
    assert latest_checkpoint(saves) == saves / "step_000003"
    assert f"{file.name} is missing" in error_of(saves / "step_000004")


def test_without_a_whole_checkpoint_there_is_an_error(saves):
    for step in (3, 4):
        (saves / f"step_{step:06d}" / "complete.json").unlink()
    with pytest.raises(ConfigError, match="none is whole: step_000004 has no complete.json"):
        latest_checkpoint(saves)
    assert latest_checkpoint(saves / "nowhere") is None


def test_a_hugging_face_folder_is_no_checkpoint(saves, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert not is_checkpoint(tmp_path)
    assert is_checkpoint(saves / "step_000004")
    (saves / "step_000004" / "complete.json").unlink()
    assert is_checkpoint(saves / "step_000004"), "a broken one must reach the error, not the Hugging Face loader"
