"""vLLM serves what export wrote: with the log-probs of the model that was imported."""

import json
import urllib.request

import torch

from tests.support.ranks import run_ranks
from tests.support.serving import KEY, logprobs, tiny_model
from tests.support.vllm_processes import needs_vllm, shares_servers

pytestmark = shares_servers


def sample(url: str, prompt: tuple[int, ...]) -> tuple[tuple[int, ...], torch.Tensor]:
    """A completion straight from a server, which holds what it read from the folder: token ids, log-probs."""
    params = {"max_tokens": 12, "temperature": 1.0, "logprobs": 0, "seed": 0}
    body = json.dumps({"token_ids": prompt, "sampling_params": params, "return_token_ids": True}).encode()
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/inference/v1/generate", body, headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        (choice,) = json.load(answer)["choices"]
    return tuple(choice["token_ids"]), torch.tensor([entry["logprob"] for entry in choice["logprobs"]["content"]])


@needs_vllm
def test_vllm_samples_from_an_exported_folder_with_the_log_probs_of_the_original(servers, tmp_path):
    source, checkpoint, back = (tmp_path / name for name in ("source", "checkpoint", "back"))
    model = tiny_model(source, "qwen3", tied=True, seed=3)
    run_ranks(1, ["-m", "nemo_jepo.cli", "import", str(source), str(checkpoint)])
    tp2 = "model.tensor_model_parallel_size=2"
    run_ranks(2, ["-m", "nemo_jepo.cli", "export", str(checkpoint), str(back), tp2])
    url = servers.start(back).url
    for start in range(1, 5):
        prompt = tuple(range(start, start + 40))
        token_ids, found = sample(url, prompt)
        torch.testing.assert_close(found, logprobs(model, prompt, token_ids), rtol=0, atol=1e-4)
