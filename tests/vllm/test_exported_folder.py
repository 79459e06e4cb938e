"""vLLM serves what export wrote, with the log-probs of the model that was imported; and then what is pushed to it."""

import json
import urllib.request

import pytest
import torch
from transformers import PreTrainedModel

from tests.support.pushes import pushed_twice_and_again
from tests.support.ranks import run_ranks
from tests.support.serving import KEY, logprobs, tiny_model
from tests.support.vllm_processes import needs_vllm

pytestmark = [needs_vllm, pytest.mark.timeout(900)]


def sample(url: str, prompt: tuple[int, ...]) -> tuple[tuple[int, ...], torch.Tensor]:
    """A completion straight from a server, which holds what it read from the folder: token ids, log-probs."""
    params = {"max_tokens": 12, "temperature": 1.0, "logprobs": 0, "seed": 0}
    body = json.dumps({"token_ids": prompt, "sampling_params": params, "return_token_ids": True}).encode()
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/inference/v1/generate", body, headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        (choice,) = json.load(answer)["choices"]
    return tuple(choice["token_ids"]), torch.tensor([entry["logprob"] for entry in choice["logprobs"]["content"]])


@pytest.fixture(scope="module")
def exported(servers, tmp_path_factory) -> tuple[str, PreTrainedModel]:
    """A Qwen3, imported and exported; a server of what was exported, and the original."""
    folder = tmp_path_factory.mktemp("exported")
    source, checkpoint, back = (folder / name for name in ("source", "checkpoint", "back"))
    model = tiny_model(source, "qwen3", tied=False, seed=3)
    run_ranks(1, ["-m", "nemo_jepo.cli", "import", str(source), str(checkpoint)])
    tp2 = "model.tensor_model_parallel_size=2"
    run_ranks(2, ["-m", "nemo_jepo.cli", "export", str(checkpoint), str(back), tp2])
    return servers.start(back, "--", "--max-num-seqs", "8").url, model


def test_vllm_samples_from_an_exported_folder_with_the_log_probs_of_the_original(exported):
    url, model = exported
    for start in range(1, 5):
        prompt = tuple(range(start, start + 40))
        token_ids, found = sample(url, prompt)
        torch.testing.assert_close(found, logprobs(model, prompt, token_ids), rtol=0, atol=1e-4)


def test_after_a_push_a_family_of_other_tensors_is_served_as_well(exported, tmp_path):
    """Qwen3 has norms of queries and keys; this one has an output head of its own."""
    url, old = exported
    pushed_twice_and_again(url, old, tiny_model(tmp_path / "2", "qwen3", False, 2), tmp_path / "files")
