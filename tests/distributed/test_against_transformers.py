"""The actor computes what transformers computes: log-probs, entropies and gradients of every family, from its folders.

The expected values are transformers' own, one sequence at a time, without packing, chunks or parallelism.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tests.support.hf_models import FAMILIES, SHAPES, on_disk, random_model, save, scored_sequences
from tests.support.ranks import run_ranks

Values = dict[str, torch.Tensor]
SEQUENCES = scored_sequences()


def token_weights() -> Values:
    draw = torch.Generator().manual_seed(4)
    return {
        str(i): torch.zeros(0) if s.failed else torch.randn(s.chain_length + s.answer_length, generator=draw)
        for i, s in enumerate(SEQUENCES)
    }


def by_transformers(model: PreTrainedModel, weights: Values) -> Values:
    """Log-probs, entropies, loss = - sum_t weight_t log p_t, and its gradients."""
    out: Values = {}
    loss = torch.zeros(())
    for index, sequence in enumerate(SEQUENCES):
        if sequence.failed:
            out[f"logprob/{index}"] = out[f"entropy/{index}"] = torch.zeros(0)
            continue
        ids = torch.tensor([sequence.token_ids])
        log_p = model(ids).logits[0, sequence.prompt_length - 1 : -1].float().log_softmax(-1)
        logprob = log_p.gather(1, ids[0, sequence.prompt_length :, None])[:, 0]
        loss = loss - weights[str(index)] @ logprob
        out[f"logprob/{index}"] = logprob.detach()
        out[f"entropy/{index}"] = -(log_p.exp() * log_p).sum(-1).detach()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    out |= {f"grad/{name}": tensor for name, tensor in on_disk(model).items()}
    return out | {"loss": loss.detach().double()}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def expected(root) -> dict[str, Values]:
    """By shape; the folders that the actor loads lie beside it, sharded for the first shape."""
    weights = token_weights()
    save_file(weights, root / "weights.safetensors")
    values = {}
    for name in SHAPES:
        model = random_model(name)
        save(model, root / name)
        values[name] = by_transformers(model, weights)  # its weights are its gradients from here on
    save(random_model("llama untied"), root / "sharded", shard_bytes=20_000)
    return values


def run_jobs(root: Path, world_size: int, **model: int) -> dict[str, Values]:
    jobs = {
        str(root / f"{name}.{world_size}"): {
            "folder": str(root / name),
            "model": model | {"sequence_parallel": world_size > 1 and "num_local_experts" in SHAPES.get(name, {})},
            "precision": "fp32",
            "token_weights": str(root / "weights.safetensors"),
        }
        for name in [*SHAPES, "sharded"]
    }
    for family in FAMILIES:
        job = jobs[str(root / f"{family} untied.{world_size}")]
        jobs[str(root / f"{family} bf16.{world_size}")] = job | {"precision": "bf16", "token_weights": None}
    (root / "jobs.json").write_text(json.dumps(jobs))
    run_ranks(world_size, [str(Path(__file__).with_name("scoring_worker.py")), str(root / "jobs.json")])
    return {Path(file).stem: load_file(file) for file in jobs}


@pytest.fixture(scope="module")
def one_process(root, expected) -> dict[str, Values]:
    return run_jobs(root, 1)


@pytest.fixture(scope="module")
def tensor_parallel(root, expected) -> dict[str, Values]:
    return run_jobs(root, 2, tensor_model_parallel_size=2)


@pytest.fixture(scope="module", params=["one_process", "tensor_parallel"])
def found(request) -> dict[str, Values]:
    return request.getfixturevalue(request.param)


def assert_close(found: Values, expected: Values, prefix: str, tolerance: float) -> None:
    names = [name for name in expected if name.startswith(prefix)]
    assert names and {name for name in found if name.startswith(prefix)} == set(names)
    for name in names:
        atol = tolerance * max(1.0, expected[name].abs().max().item() if expected[name].numel() else 0.0)
        torch.testing.assert_close(
            found[name], expected[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_log_probs_and_entropies_are_those_of_transformers(shape, found, expected):
    assert_close(found[shape], expected[shape], "logprob/", 1e-5)
    assert_close(found[shape], expected[shape], "entropy/", 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_every_gradient_are_those_of_transformers(shape, found, expected):
    assert_close(found[shape], expected[shape], "loss", 1e-5)
    assert_close(found[shape], expected[shape], "grad/", 2e-5)
    assert all(expected[shape][name].abs().max() > 1e-3 for name in expected[shape] if name.startswith("grad/"))


def test_a_sharded_folder_is_the_same_model(root, found, expected):
    assert len(list((root / "sharded").glob("*.safetensors"))) > 3
    assert len(list((root / "llama untied").glob("*.safetensors"))) == 1
    assert all(torch.equal(found["sharded"][name], value) for name, value in found["llama untied"].items())


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_rounds_no_more_than_transformers_in_bf16(family, found, expected):
    shape = f"{family} untied"
    names = [name for name in expected[shape] if name.startswith("logprob/")]
    rounded = by_transformers(random_model(shape).bfloat16(), token_weights())
    error, usual_error = (
        torch.cat([values[name] - expected[shape][name] for name in names]).square().mean().sqrt().item()
        for values in (found[f"{family} bf16"], rounded)
    )
    assert 0 < error < 1.25 * usual_error < 0.1


def test_the_long_sequence_feels_llama3_scaling(expected):
    """Without this the scaled cases could pass with plain rotary embeddings."""
    model = random_model("llama3 untied")
    plain = random_model("llama untied")
    plain.load_state_dict(model.state_dict())
    plain.model.rotary_emb.inv_freq = 3000.0 ** -(torch.arange(0, 16, 2) / 16)
    values = by_transformers(plain, token_weights())
    last = f"logprob/{len(SEQUENCES) - 1}"
    assert (values[last] - expected["llama3 untied"][last]).abs().max() > 1e-3
