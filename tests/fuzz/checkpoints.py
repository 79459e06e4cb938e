"""Checkpoints that were damaged, or made to execute something: refused in one line, or loaded as they were written.

damage     any file is changed, cut, lengthened, exchanged or lost; the marker keeps the checksums of the original
payload    .metadata or common.pt is changed by whoever writes a marker that fits: pickles that call functions
"""

import functools
import pickle
import random
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from nemo_jepo.actor.parallel import init_distributed
from nemo_jepo.checkpoint.format import MARKER, mark_complete
from nemo_jepo.checkpoint.writer import CheckpointWriter, load_checkpoint
from tests.distributed import checkpoint_jobs as jobs
from tests.distributed.damage_jobs import Payload
from tests.fuzz.runner import Campaign

SEEDS = st.binary(min_size=8, max_size=8)
CALLS = [
    ("os", "mkdir"),
    ("os", "system"),
    ("posix", "mkdir"),
    ("builtins", "exec"),
    ("builtins", "eval"),
    ("torch", "load"),
    ("torch", "os.mkdir"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath.mkdir"),
]


@functools.cache
def whole() -> tuple[Path, Any, dict[str, torch.Tensor]]:
    """A checkpoint of one rank, the actor that loads it, and what it then holds."""
    init_distributed()
    actor, folder = jobs.build({"model": {}}), Path(tempfile.mkdtemp(prefix="nemo_jepo_fuzz_"))
    jobs.update(actor)
    CheckpointWriter(folder, 1, jobs.write_model_files).save(1, lambda: jobs.run_state(actor), last=True)
    return folder / "step_000001", actor, jobs.state_of(actor)


def load(path: Path) -> None:
    """Load it; what was loaded must be what was written."""
    _, actor, expected = whole()
    state = load_checkpoint(path, actor.sharded_state_dict(is_loading=True))
    actor._scheduler.num_steps = 0  # as a start has it: Megatron adds the steps of a checkpoint to its own
    actor.load_state_dict(state.sharded)
    assert state.loop == jobs.LOOP_STATE, "another place in the data"
    held = jobs.state_of(actor)
    assert held.keys() == expected.keys()
    wrong = [name for name, tensor in expected.items() if not torch.equal(tensor, held[name])]
    assert not wrong, f"silently wrong: {wrong[:3]}"


def copy_of(path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(path, Path(tempfile.mkdtemp(prefix="nemo_jepo_fuzz_")) / path.name))


def damage(value: bytes) -> None:
    """Load a checkpoint in which one file is not what it was."""
    draw, path = random.Random(value), copy_of(whole()[0])
    try:
        files = sorted(file for file in path.rglob("*") if file.is_file())
        change(draw, draw.choice(files), files)
        load(path)
    finally:
        shutil.rmtree(path.parent)


def change(draw: random.Random, file: Path, files: list[Path]) -> None:
    """Damage a file in one of the ways in which disks and people do."""
    content = bytearray(file.read_bytes())
    place, length = draw.randrange(len(content)), draw.randint(1, 4096)
    match draw.choice(["bit", "bit", "bit", "byte", "zeros", "cut", "longer", "lost", "exchanged", "letter", "empty"]):
        case "bit":
            content[place] ^= 1 << draw.randrange(8)
        case "byte":
            content[place] = draw.randrange(256)
        case "letter":
            content[place] = draw.choice(b'0123456789abcdef"{}[],: ')
        case "zeros":
            content[place : place + length] = bytes(len(content[place : place + length]))
        case "cut":
            del content[place:]
        case "longer":
            content += draw.randbytes(length)
        case "empty":
            content.clear()
        case "exchanged":
            content[:] = draw.choice(files).read_bytes()
        case "lost":
            file.unlink()
            return
    file.write_bytes(content)


def payload(value: bytes) -> None:
    """Load a checkpoint whose writer wanted something executed, or at least a traceback."""
    draw, path = random.Random(value), copy_of(whole()[0])
    witness = path.parent / "executed"
    try:
        file = path / draw.choice([".metadata", ".metadata", "common.pt", "metadata.json", "loop.json"])
        held = file.read_bytes()
        match draw.choice(["call", "mutated", "mutated", "spliced", "other"]):
            case "call":
                file.write_bytes(a_call(draw, witness, file.name == "common.pt"))
            case "mutated":
                content = bytearray(held)
                for _ in range(draw.randint(1, 8)):
                    content[draw.randrange(len(content))] = draw.randrange(256)
                file.write_bytes(content)
            case "spliced":
                place = draw.randrange(len(held))
                file.write_bytes(held[:place] + a_call(draw, witness, False)[2:-1] + held[place:])
            case "other":
                file.write_bytes(pickle.dumps(draw.choice([None, [], {}, "", 1, b"x", [[]] * 9])))
        (path / MARKER).unlink()
        mark_complete(path, 1)
        load_checkpoint(path, whole()[1].sharded_state_dict(is_loading=True))  # any numbers, but nothing executed
    finally:
        executed = witness.exists()
        shutil.rmtree(path.parent)
        assert not executed, "it was executed"


def a_call(draw: random.Random, witness: Path, as_torch: bool) -> bytes:
    """A pickle that makes the witness, if somebody lets it."""
    module, name = draw.choice(CALLS)
    argument = {"exec": f"import os; os.mkdir({str(witness)!r})", "eval": f"__import__('os').mkdir({str(witness)!r})"}
    text = argument.get(name, f"mkdir {witness}" if name == "system" else str(witness))
    if as_torch:
        file = witness.with_name("payload.pt")
        torch.save(Payload(witness), file)
        return file.read_bytes()
    if draw.random() < 0.5:  # protocol 0
        return f"c{module}\n{name}\n(V{text}\ntR.".encode()
    strings = [b"\x8c" + struct.pack("<B", len(part)) + part for part in (module.encode(), name.encode())]
    body = b"X" + struct.pack("<I", len(text.encode())) + text.encode()
    return b"\x80\x04" + strings[0] + strings[1] + b"\x93" + body + b"\x85R."


DAMAGE = Campaign(SEEDS, damage, share=0.5, prepare=whole)
PAYLOAD = Campaign(SEEDS, payload, share=0.5, prepare=whole)
