"""A checkpoint with one changed byte is never loaded, and nothing in one is executed."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_jepo.checkpoint.format import mark_complete
from tests.distributed.checkpoint_jobs import trained
from tests.distributed.damage_jobs import fuzzed, loaded, object_loaded, with_payload
from tests.support.rank_pool import on_ranks

TP2 = {"tensor_model_parallel_size": 2}
ONE, TWO = (1, {"model": {}}), (2, {"model": TP2})


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Step 2, written by two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    on_ranks(2, trained, {"model": TP2, "save": str(folder)})
    return folder / "step_000002"


@pytest.fixture
def copies(whole, tmp_path) -> Iterator[Path]:
    """A new copy at each call of next."""
    return (Path(shutil.copytree(whole, tmp_path / f"{number}" / "step_000002")) for number in range(1000))


def outcomes(place: tuple[int, dict[str, Any]], paths: list[Path], **job: Any) -> list[dict[str, Any]]:
    """What rank 0 had of each folder; the other ranks must have had the same line."""
    size, layout = place
    ranks = on_ranks(size, loaded, layout | {"paths": [str(path) for path in paths]} | job)
    for other in ranks[1:]:
        assert [one.get("line") for one in other] == [one.get("line") for one in ranks[0]]
    return ranks[0]


def changed(path: Path, name: str, draw: random.Random) -> Path:
    """The checkpoint with one bit of a file changed."""
    content = bytearray((path / name).read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    (path / name).write_bytes(content)
    return path


def assert_same(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert state.keys() == expected.keys() and state
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


def files_of(path: Path) -> list[str]:
    return sorted(json.loads((path / "complete.json").read_text())["files"])


@pytest.mark.parametrize("place", [ONE, TWO], ids=["one process", "TP2"])
@pytest.mark.parametrize("weights_alone", [False, True], ids=["resume", "weights alone"])
def test_a_changed_bit_of_any_file_is_found_and_the_file_named(place, weights_alone, whole, copies):
    draw, names = random.Random(3), files_of(whole)
    assert sum(name.endswith(".distcp") for name in names) == 4 and len(names) == 9
    paths = [changed(next(copies), name, draw) for name in names]
    for name, outcome in zip(names, outcomes(place, paths, weights_alone=weights_alone), strict=True):
        assert f"{name} holds other bytes than when it was written (sha256). " in outcome["line"]


def test_a_file_that_nobody_reads_is_compared_by_all_and_by_none_no_file(whole, copies):
    """Here a file of a rank whose tensors nobody wants."""
    more = next(copies)
    shutil.copy(more / "__0_0.distcp", more / "__7_0.distcp")
    (more / "complete.json").unlink()
    mark_complete(more, 2)
    unread, read = changed(more, "__7_0.distcp", random.Random(5)), next(copies)
    (read / "config.json").write_text("[]")
    whole_state, unread_state = outcomes(ONE, [whole, unread], weights_alone=True)
    assert_same(unread_state["state"], whole_state["state"])
    (found,) = outcomes(TWO, [unread], weights_alone=True, verify="all")
    assert "__7_0.distcp holds other bytes" in found["line"]
    (found,) = outcomes(ONE, [read], verify="none")
    assert "state" in found


def test_a_changed_character_of_the_marker_is_found_or_changes_nothing(whole, copies):
    draw, paths = random.Random(7), []
    (expected,) = outcomes(ONE, [whole])
    for _ in range(40):
        paths.append(changed(next(copies), "complete.json", draw))
    found = outcomes(ONE, paths)
    assert sum("line" in outcome for outcome in found) >= 30  # spaces between the words may be any
    for outcome in found:
        if "state" in outcome:
            assert_same(outcome["state"], expected["state"])


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
@pytest.mark.parametrize("marked", [False, True], ids=["checksums of the original", "checksums of its own"])
def test_a_pickle_that_executes_something_is_refused_by_name(name, marked, copies, tmp_path):
    path, witness = next(copies), tmp_path / "executed"
    with_payload(path / name, witness)
    if marked:
        (path / "complete.json").unlink()
        mark_complete(path, 2)
    for place in (ONE, TWO):
        (outcome,) = outcomes(place, [path])
        if marked:
            assert f"{name} cannot be read (" in outcome["line"] or "cannot be loaded (" in outcome["line"]
            assert "posix.mkdir" in outcome["line"]
        else:
            assert f"{name} is missing or has another size" in outcome["line"]
    assert not witness.exists()


def test_an_object_in_a_shard_that_executes_something_is_refused_by_name(tmp_path):
    for line in on_ranks(2, object_loaded, {"folder": str(tmp_path / "saved"), "witness": str(tmp_path / "executed")}):
        assert "posix.mkdir" in line and "cannot be read (" in line
    assert not (tmp_path / "executed").exists()


def test_a_shard_outside_of_the_folder_is_not_read(copies, tmp_path):
    """.metadata names the file that a shard lies in; the marker, which a user can read, must list it."""
    path = next(copies)
    held = (path / ".metadata").read_bytes()
    name = b"__0_0.distcp"
    assert name in held
    (path / ".metadata").write_bytes(held.replace(name, b"../../secret"))
    (path / "complete.json").unlink()
    mark_complete(path, 2)
    (outcome,) = outcomes(ONE, [path])
    assert "../../secret is not among the files that it lists" in outcome["line"]


@pytest.mark.parametrize("name", ["damage", "payload"])
def test_some_inputs_of_the_campaigns_are_refused_in_one_line_or_change_nothing(name, tmp_path):
    ((tried, failures),) = on_ranks(1, fuzzed, name, 15, str(tmp_path))
    assert not failures and tried > 10, failures[:1]
