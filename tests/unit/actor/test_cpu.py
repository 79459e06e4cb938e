"""The gloo shim leaves torch to everybody else as it was; in a process of its own, because it stays for good."""

import subprocess
import sys

PROGRAM = """
import torch
from nemo_jepo.actor import cpu

cpu.install()
assert torch.zeros(1, device="cuda").device.type == "cpu"
factories = [lambda: torch.tensor([]), lambda: torch.zeros(1), lambda: torch.ones(1), lambda: torch.empty(1)]
with torch.device("meta"):
    devices = [make().device.type for make in factories]
assert devices == ["meta"] * 4, devices
assert [make().device.type for make in factories] == ["cpu"] * 4
"""


def test_a_device_that_somebody_asks_for_is_where_tensors_are_made():
    """transformers builds a model on the meta device to load it, and leaves its rotary embedding unset elsewhere."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
