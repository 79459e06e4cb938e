"""The actor on a GPU scores folders as transformers does, in bf16: its error is that of transformers in bf16."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.test_against_transformers import SEQUENCES, Values, by_transformers, token_weights
from tests.support.hf_models import random_model, save
from tests.support.ranks import ROOT, run_ranks

FAMILIES = ("llama", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def by_actor(tmp_path_factory) -> dict[str, Values]:
    """Transformer Engine's layers where they are installed, local ones with SDPA attention otherwise."""
    root = tmp_path_factory.mktemp("models")
    jobs = {
        str(root / f"{family}.out"): {
            "folder": save(random_model(f"{family} untied"), root / family),
            "model": {},
            "precision": "bf16",
            "token_weights": None,
        }
        for family in FAMILIES
    }
    (root / "jobs.json").write_text(json.dumps(jobs))
    run_ranks(1, [str(ROOT / "tests/distributed/scoring_worker.py"), str(root / "jobs.json")])
    return {Path(file).stem: load_file(file) for file in jobs}


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
