"""Local layers and Transformer Engine's read each other's checkpoints."""

import pytest
import torch

from tests.distributed.batch import TINY
from tests.distributed.layer_kind_jobs import crossed
from tests.support.rank_pool import on_ranks

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}
SHAPES = {
    "llama": TINY | {"model_type": "llama", "tie_word_embeddings": False},
    "qwen3": TINY | {"model_type": "qwen3", "tie_word_embeddings": True},
    "mixtral": TINY | EXPERTS | {"model_type": "mixtral"},
}


@pytest.mark.parametrize("extra_state", [False, True], ids=["local to extra state", "extra state to local"])
@pytest.mark.parametrize("shape", SHAPES)
def test_extra_state_of_norms_does_not_part_checkpoints(shape, extra_state, tmp_path):
    job = {"shape": SHAPES[shape], "extra_state": extra_state, "folder": str(tmp_path)}
    (found,) = on_ranks(1, crossed, job)
    assert found["saved"].keys() == found["read"].keys()
    assert all(torch.equal(found["read"][name], weight) for name, weight in found["saved"].items())


def test_the_norm_before_experts_has_transformer_engines_name_in_a_checkpoint(tmp_path):
    job = {"shape": SHAPES["mixtral"], "extra_state": False, "folder": str(tmp_path)}
    (found,) = on_ranks(1, crossed, job)
    assert any(name.endswith("pre_mlp_layernorm.weight") for name in found["names"])
    assert not any("mlp.linear_fc1.layer_norm_weight" in name for name in found["names"])
