"""The actor computes what transformers computes: log-probs, entropies and gradients of every family, from its folders.

The expected values are transformers' own, one sequence at a time, without packing, chunks or parallelism.
"""

import functools
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.distributed.scoring_jobs import scores_and_gradients
from tests.support.hf_models import FAMILIES, SHAPES, on_disk, random_model, save, scored_sequences
from tests.support.rank_pool import on_ranks

Values = dict[str, torch.Tensor]
SEQUENCES = scored_sequences()
CASES = [(shape, 1) for shape in SHAPES]
CASES += [(f"{family} untied", 2) for family in FAMILIES] + [("llama tied", 2)]


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


@functools.cache
def rounded_by_transformers(shape: str) -> Values:
    return by_transformers(random_model(shape).bfloat16(), token_weights())


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def expected(root) -> dict[str, Values]:
    """By shape; the folders that the actor loads lie beside it, sharded for the first shape."""
    weights = token_weights()
    values = {}
    for name in SHAPES:
        model = random_model(name)
        save(model, root / name)
        values[name] = by_transformers(model, weights)  # its weights are its gradients from here on
    save(random_model("llama untied"), root / "sharded", shard_bytes=20_000)
    return values


@functools.cache
def by_actor(root: Path, shape: str, world_size: int, precision: str = "fp32") -> Values:
    """What the actor computes with the folder of a shape in one process or TP2: gradients too, in fp32."""
    layout = {"tensor_model_parallel_size": world_size}
    layout["sequence_parallel"] = world_size > 1 and "num_local_experts" in SHAPES.get(shape, {})
    weights = list(token_weights().values()) if precision == "fp32" else None
    job = {"folder": str(root / shape), "model": layout, "precision": precision, "token_weights": weights}
    return on_ranks(world_size, scores_and_gradients, job)[0]


def assert_close(found: Values, expected: Values, prefix: str, tolerance: float) -> None:
    names = [name for name in expected if name.startswith(prefix)]
    assert names and {name for name in found if name.startswith(prefix)} == set(names)
    for name in names:
        atol = tolerance * max(1.0, expected[name].abs().max().item() if expected[name].numel() else 0.0)
        torch.testing.assert_close(
            found[name], expected[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(("shape", "world_size"), CASES)
def test_log_probs_entropies_loss_and_every_gradient_are_those_of_transformers(shape, world_size, root, expected):
    found = by_actor(root, shape, world_size)
    assert_close(found, expected[shape], "logprob/", 1e-5)
    assert_close(found, expected[shape], "entropy/", 1e-5)
    assert_close(found, expected[shape], "loss", 1e-5)
    assert_close(found, expected[shape], "grad/", 2e-5)
    assert all(expected[shape][name].abs().max() > 1e-3 for name in expected[shape] if name.startswith("grad/"))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_sharded_folder_is_the_same_model(world_size, root, expected):
    assert len(list((root / "sharded").glob("*.safetensors"))) > 3
    assert len(list((root / "llama untied").glob("*.safetensors"))) == 1
    sharded, whole = (by_actor(root, shape, world_size) for shape in ("sharded", "llama untied"))
    assert all(torch.equal(sharded[name], value) for name, value in whole.items())


@pytest.mark.parametrize(
    ("family", "world_size"), [*((family, 1) for family in FAMILIES), ("llama", 2), ("mixtral", 2)]
)
def test_bf16_rounds_no_more_than_transformers_in_bf16(family, world_size, root, expected):
    shape = f"{family} untied"
    names = [name for name in expected[shape] if name.startswith("logprob/")]
    found = by_actor(root, shape, world_size, "bf16")
    error, usual_error = (
        torch.cat([values[name] - expected[shape][name] for name in names]).square().mean().sqrt().item()
        for values in (found, rounded_by_transformers(shape))
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
