"""The actor on a GPU scores folders as transformers does, in bf16: its error is that of transformers in bf16."""

import pytest
import torch

from tests.distributed.scoring_jobs import scores_and_gradients
from tests.distributed.test_against_transformers import SEQUENCES, Values, by_transformers, token_weights
from tests.support.hf_models import random_model, save
from tests.support.rank_pool import RankPool

FAMILIES = ("llama", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def by_actor(tmp_path_factory) -> dict[str, Values]:
    """Transformer Engine's layers where they are installed, local ones otherwise."""
    root = tmp_path_factory.mktemp("models")
    scores = {}
    with RankPool(1, forked=False) as gpu:
        for family in FAMILIES:
            folder = save(random_model(f"{family} untied"), root / family)
            job = {"folder": folder, "model": {}, "precision": "bf16", "token_weights": None}
            (scores[family],) = gpu.run(scores_and_gradients, job)
    return scores


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_on_the_gpu_rounds_no_more_than_transformers_in_bf16(family, by_actor):
    exact = by_transformers(random_model(f"{family} untied"), token_weights())
    rounded = by_transformers(random_model(f"{family} untied").bfloat16(), token_weights())
    names = [f"logprob/{index}" for index in range(len(SEQUENCES))]
    error, usual_error = (
        torch.cat([values[name] - exact[name] for name in names]).square().mean().sqrt().item()
        for values in (by_actor[family], rounded)
    )
    assert 0 < error < 1.5 * usual_error < 0.15
