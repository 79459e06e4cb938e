"""Weights through memory that two processes map."""

import subprocess
import sys

import pytest
import torch

from nemo_jepo.rollout.vllm import shared_memory
from nemo_jepo.rollout.vllm.shared_memory import SharedSlots, mapped, tensors_at

SHAPES = [(2, 3), (4,), (5,), (3, 4), (2,)]


@pytest.fixture(autouse=True)
def small_slots(monkeypatch):
    """Ten elements of fp32; a page each all the same."""
    monkeypatch.setattr(shared_memory, "SLOT_BYTES", 40)


def test_what_is_read_is_what_was_filled_in_and_the_slot_before_stays_meanwhile():
    """Buckets of 6 + 4, 5, 12 and 2 elements in two slots; the 12 are more than a slot was to have."""
    sent = [torch.randn(*shape) for shape in SHAPES]
    sent[0] = torch.randn(3, 2).t()
    slots, stream, begun = SharedSlots(SHAPES, torch.float32), iter(sent), 0
    other, arrived, before = mapped(slots.place), [], None
    assert slots.buckets == [[6, 4], [5], [12], [2]]
    for number, bucket in enumerate(slots.buckets):
        start = slots.fill(number, stream)
        views = tensors_at(other, start, SHAPES[begun : begun + len(bucket)], torch.float32)
        if before is not None:
            assert torch.equal(before, arrived[-1])
        arrived += [view.clone() for view in views]
        before, begun = views[-1], begun + len(bucket)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(sent, arrived, strict=True))
    slots.close()


def test_another_process_of_this_user_reads_it_and_nothing_is_left_of_it_afterwards():
    slots = SharedSlots([(4,)], torch.bfloat16)
    start = slots.fill(0, iter([torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.bfloat16)]))
    program = (
        "import torch; from nemo_jepo.rollout.vllm.shared_memory import *; "
        f"memory = mapped(Place({slots.place.path!r}, {slots.place.num_bytes})); "
        f"print(tensors_at(memory, {start}, [(2, 2)], torch.bfloat16)[0].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[[1.0, 2.0], [3.0, 4.0]]", done.stderr
    slots.close()
    with pytest.raises(OSError):
        mapped(slots.place)
