"""A checkpoint brings back everything, in its own layout bit for bit; what is not whole is never taken for one."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemo_jepo.checkpoint.format import is_checkpoint, latest_checkpoint, whole_checkpoints
from nemo_jepo.checkpoint.writer import load_checkpoint
from nemo_jepo.config.errors import ConfigError
from tests.support.ranks import run_ranks

TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
TIED, BF16, PLAIN = {"tied": True}, {"precision": "bf16"}, {"distributed": False}
CHUNKS = PP2 | {"virtual_pipeline_model_parallel_size": 2}
UNEVEN, CP2 = PP2 | {"num_layers_in_first_pipeline_stage": 1}, {"context_parallel_size": 2}
EP2, TP2SP = {"expert_model_parallel_size": 2}, TP2 | {"sequence_parallel": True}
EXPERTS = {"shape": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}}
SAVED: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "TP2": {"model": TP2},
        "DP2": {"model": {}},
        "PP2 tied": {"model": PP2} | TIED,
        "PP2 in 4 chunks": {"model": CHUNKS},
        "EP2": {"model": EP2} | EXPERTS,
    },
    1: {
        "one process": {"model": {}},
        "bf16": {"model": {}} | BF16,
        "plain optimizer": {"model": {}} | PLAIN,
        "plain optimizer bf16": {"model": {}} | PLAIN | BF16,
    },
}
# (processes, name, who wrote the checkpoint, job that reads it and writes it anew); TP2 goes through four layouts
READ: list[tuple[int, str, str, dict[str, Any]]] = [
    (2, "TP2 -> PP2", "TP2", {"model": PP2}),
    (2, "DP2 -> TP2", "DP2", {"model": TP2}),
    (2, "TP2 -> PP2 in 4 chunks", "TP2", {"model": CHUNKS}),
    (2, "TP2 -> 1 layer and 3", "TP2", {"model": UNEVEN}),
    (2, "DP2 -> CP2", "DP2", {"model": CP2}),
    (2, "EP2 -> PP2", "EP2", {"model": PP2} | EXPERTS),
    (2, "EP2 -> TP2", "EP2", {"model": TP2SP} | EXPERTS),
    (1, "EP2 -> one process", "EP2", {"model": {}} | EXPERTS),
    (1, "PP2 in 4 chunks -> one process", "PP2 in 4 chunks", {"model": {}}),
    (1, "TP2 -> PP2 -> one process", "TP2 -> PP2", {"model": {}}),
    (1, "DP2 -> one process", "DP2", {"model": {}}),
    (1, "PP2 tied -> one process", "PP2 tied", {"model": {}} | TIED),
    (2, "TP2 -> PP2 -> one process -> DP2", "TP2 -> PP2 -> one process", {"model": {}}),
]
BACKGROUND = {  # with a plain optimizer the second replica has nothing to write
    2: {
        "TP2 in background": {"model": TP2, "held_rank": 1},
        "DP2 in background": {"model": {}, "held_rank": 0} | PLAIN,
    }
}
SAME_LAYOUT = [(name, rank) for ranks in SAVED for name in SAVED[ranks] for rank in range(ranks)]


def jobs_of(ranks: int, root: Path) -> dict[str, dict[str, Any]]:
    """What so many processes do in their first round."""
    jobs = {}
    for name, job in SAVED[ranks].items():
        jobs[name] = job | {"save": str(root / f"{name} saves")}
        jobs[f"{name} again"] = job | {"resume": str(root / f"{name} saves" / "step_000002")}
    for name, job in BACKGROUND.get(ranks, {}).items():
        jobs[name] = job | {"background": str(root / f"{name} saves")}
    if ranks == 1:
        jobs["full disk"] = {"model": {}, "full_disk": str(root / "full disk saves")}
        jobs["kept"] = {"model": {}, "save": str(root / "kept saves"), "steps": [1, 2, 3, 4], "dies_at": 5}
    return jobs


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Every job's report and checkpoints: rounds of two processes, one and two, which read what earlier ones wrote."""
    root = tmp_path_factory.mktemp("checkpoints")
    done: set[str] = set()
    for ranks in (2, 1, 2):
        jobs = {name: job for name, job in jobs_of(ranks, root).items() if name not in done}
        for processes, name, writer, job in READ:
            if processes == ranks and name not in done and writer in done | jobs.keys():
                jobs[name] = job | {"resume": str(root / f"{writer} saves" / "step_000002")}
                jobs[name]["save"] = str(root / f"{name} saves")
        done |= jobs.keys()
        (root / "jobs.json").write_text(json.dumps({str(root / name): job for name, job in jobs.items()}))
        run_ranks(
            ranks, ["-c", "from tests.distributed.checkpoint_worker import main; main()", str(root / "jobs.json")]
        )
    return root


def report(root: Path, name: str, rank: int = 0) -> dict[str, torch.Tensor]:
    return load_file(root / f"{name}.{rank}")


@pytest.mark.parametrize("name, rank", SAME_LAYOUT)
def test_resuming_gives_the_state_and_the_next_update_bit_for_bit(name, rank, root):
    uninterrupted, resumed = report(root, name, rank), report(root, f"{name} again", rank)
    assert uninterrupted.keys() == resumed.keys()
    assert any("exp_avg_sq" in part for part in resumed) and resumed["saved/num_steps"] == 2
    different = [part for part in resumed if not torch.equal(resumed[part], uninterrupted[part])]
    assert not different


def test_the_next_update_does_change_the_state(root):
    state = report(root, "one process")
    for part in ("weight/model.norm.weight", "weight/lm_head.weight", "lr", "num_steps", "adam/0/0/step"):
        assert not torch.equal(state[f"saved/{part}"], state[f"next/{part}"]), part


@pytest.mark.parametrize("name, writer", [(name, name.split(" -> ")[0]) for _, name, _, _ in READ])
def test_another_layout_goes_on_from_the_same_state(name, writer, root):
    """Weights at once bit for bit; loss, gradient norm and weights of the next update within fp32 summation order."""
    original, reader = report(root, writer), report(root, name)
    for part in original:
        if part.startswith("saved/weight/"):
            assert torch.equal(reader[part], original[part]), part
        elif part.startswith("next/metric/"):
            torch.testing.assert_close(reader[part], original[part], rtol=1e-5, atol=1e-6, msg=part)
        elif part.startswith("next/") and "adam" not in part:
            torch.testing.assert_close(reader[part], original[part], rtol=1e-4, atol=1e-5, msg=part)


@pytest.mark.parametrize("name", ["TP2", "DP2"])
def test_a_save_in_the_background_writes_the_bits_of_the_state_it_was_asked_for(name, root):
    """The worker checks when it becomes a checkpoint; meanwhile an update changed the state in place."""
    background = report(root, f"{name} in background")
    assert not torch.equal(background["saved/weight/model.norm.weight"], background["next/weight/model.norm.weight"])
    files = checksums(root / f"{name} in background saves" / "step_000002")
    if name == "TP2":
        assert files == checksums(root / "TP2 saves" / "step_000002")
    assert len([file for file in files if file.endswith(".distcp")]) == (4 if name == "TP2" else 2)


def checksums(checkpoint: Path) -> dict[str, str]:
    """Of all files but .metadata, in which torch writes the folder's name."""
    checksums = json.loads((checkpoint / "complete.json").read_text())["sha256"]
    del checksums[".metadata"]
    return checksums


def test_the_newest_two_are_kept_and_a_save_that_dies_changes_nothing(root):
    folder = root / "kept saves"
    assert [path.name for path in whole_checkpoints(folder)] == ["step_000003", "step_000004"]
    assert latest_checkpoint(folder) == folder / "step_000004"
    assert (folder / "latest").read_text() == "step_000004"
    names = {re.sub(r"[0-9a-f]{8}", "*", path.name) for path in folder.iterdir()}
    assert names == {"step_000003", "step_000004", ".step_000005.*.partial", "latest"}


def test_a_background_writer_that_fails_leaves_the_older_checkpoint_the_newest(root):
    """The worker checks that the run hears of it."""
    folder = root / "full disk saves"
    assert [path.name for path in whole_checkpoints(folder)] == ["step_000001"]
    assert (folder / "latest").read_text() == "step_000001" and not (folder / "step_000002").exists()


@pytest.fixture
def saves(root, tmp_path) -> Path:
    """A folder with steps 3 and 4, to be damaged."""
    return Path(shutil.copytree(root / "kept saves", tmp_path / "checkpoints"))


def error_of(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_checkpoint(path, {})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_complete_json_a_folder_is_passed_over(saves):
    (saves / "step_000004" / "complete.json").unlink()
    assert latest_checkpoint(saves) == saves / "step_000003"
    assert "step_000004': has no readable complete.json" in error_of(saves / "step_000004")


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


def test_without_a_whole_checkpoint_there_is_no_latest(saves):
    for step in (3, 4):
        (saves / f"step_{step:06d}" / "complete.json").unlink()
    assert latest_checkpoint(saves) is None
    assert latest_checkpoint(saves / "nowhere") is None


def test_a_hugging_face_folder_is_no_checkpoint(saves, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert not is_checkpoint(tmp_path)
    assert is_checkpoint(saves / "step_000004")
    (saves / "step_000004" / "complete.json").unlink()
    assert is_checkpoint(saves / "step_000004"), "a broken one must reach the error, not the Hugging Face loader"
