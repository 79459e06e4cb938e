"""Transformer Engine without a GPU: its own Python, which `make te-stub` fetches, over the names of `te_kernels`.

Layers, their parameters, state dicts and FP8 recipes are those of a GPU run; nothing can be computed. `install` changes
its process for good and comes before Megatron-core is imported, so such a process is started for it.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

from tests.support import te_kernels
from tests.support.ranks import ROOT

FOLDER = ROOT / ".venv" / "te_stub"
UNUSED = ("onnx", "onnxscript", "triton", "triton.language", "triton.language.core", "triton.language.standard")
"""What Transformer Engine imports and its layers do not use. Triton is missing beside a torch for CPUs."""
HOPPER = SimpleNamespace(name="H100", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132)


def install() -> None:
    """Make `import transformer_engine.pytorch` work in this process."""
    import torch._dynamo  # noqa: F401 - it looks for Triton, and must not find a mock

    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # no CUDA library is loaded
    sys.path.insert(0, str(FOLDER))
    sys.modules["transformer_engine.pytorch"] = None  # type: ignore[assignment] # not yet: it would load the kernels
    import transformer_engine.common

    del sys.modules["transformer_engine.pytorch"]
    transformer_engine.common.load_framework_extension = lambda framework: None
    sys.modules["transformer_engine_torch"] = te_kernels
    missing = [name for name in UNUSED if importlib.util.find_spec(name.partition(".")[0]) is None]
    sys.modules |= {name: mock.MagicMock(__version__="0") for name in missing}
    import transformer_engine.pytorch  # noqa: F401

    for name in missing:
        del sys.modules[name]


@contextmanager
def hopper() -> Iterator[None]:
    """Inside the block torch tells of a Hopper GPU; by `nemo_jepo.actor.cpu` its tensors are still on the host."""
    import torch

    with ExitStack() as patches:
        for place, name, value in (
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "get_device_capability", lambda device=None: (HOPPER.major, HOPPER.minor)),
            (torch.cuda, "get_device_properties", lambda device=None: HOPPER),
            (torch.version, "cuda", "13.0"),
        ):
            patches.enter_context(mock.patch.object(place, name, value))
        yield
