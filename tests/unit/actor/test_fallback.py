"""What stands in for Transformer Engine and Apex on GPUs without them. The gloo tests run it on a CPU."""

import pytest
import torch
from megatron.core import optimizer
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.transformer.moe import moe_utils

from nemo_jepo.actor import fallback


@pytest.fixture
def gpu(monkeypatch) -> pytest.MonkeyPatch:
    """A GPU, and Megatron as it is imported without the two libraries."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", True)
    monkeypatch.setattr(optimizer, "Adam", torch.optim.AdamW)
    monkeypatch.setattr(distrib_optimizer, "Adam", torch.optim.Adam)
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", False)
    monkeypatch.setattr(distrib_optimizer, "USING_APEX_OPTIMIZER", False)
    for name in ("multi_tensor_applier", "multi_tensor_scale_impl", "l2_norm_impl"):
        monkeypatch.setattr(clip_grads, name, getattr(clip_grads, name))
    monkeypatch.delattr(moe_utils, "te_general_gemm", raising=False)
    return monkeypatch


def test_without_the_libraries_the_step_count_is_the_groups_and_a_router_runs(gpu):
    """A torch.optim.AdamW that has made no step has no step count, and no checkpoint can be loaded into it."""
    fallback.install()
    assert distrib_optimizer.Adam is optimizer.Adam is fallback.FusedAdam
    assert distrib_optimizer.HAVE_APEX_OR_TE and not optimizer.USING_PYTORCH_OPTIMIZER
    assert moe_utils.te_general_gemm is None


def test_with_one_of_them_its_optimizer_stays(gpu):
    gpu.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", False)
    fallback.install()
    assert optimizer.Adam is torch.optim.AdamW
    assert moe_utils.te_general_gemm is None


def test_the_norm_of_many_tensors_never_leaves_the_device():
    """On the meta device nothing can be read back."""
    tensors = [torch.ones(3), torch.full((2, 2), 2.0)]
    found, _ = fallback.l2_norm(1, torch.zeros(1), [tensors], False)
    torch.testing.assert_close(found, torch.tensor([19.0]).sqrt())
    on_meta, _ = fallback.l2_norm(1, torch.zeros(1), [[tensor.to("meta") for tensor in tensors]], False)
    assert on_meta.shape == (1,)
