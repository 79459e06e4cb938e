"""Weights in, and what a real vLLM server samples with them afterwards: the new model's tokens, to rounding."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from nemo_jepo.config.schema import VLLMConfig
from nemo_jepo.rollout.sampler import GenerationRequest
from nemo_jepo.rollout.vllm.pool import Pool
from nemo_jepo.rollout.vllm.push import Pushed, WeightTransfer
from nemo_jepo.types import Prompt, Rollout
from tests.support.serving import KEY, VOCAB, logprobs
from tests.support.vllm_processes import wait_until

PROMPTS = [Prompt(i, tuple(range(1 + i, 41 + i)), "question", "answer") for i in range(4)]
ROUNDING = 2e-5
"""Nats, in fp32."""


def request(max_tokens: int = 12) -> GenerationRequest:
    return GenerationRequest(
        num_generations_per_prompt=2, max_tokens=max_tokens, stop_at_marker=False, temperature=1.0, seed=0
    )


def stream(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """As `weights.stream.weight_stream` gives it: a tied head is left out."""
    for name, parameter in model.named_parameters():
        yield name, parameter.detach()


@contextmanager
def transfer_of(pool: Pool, model: PreTrainedModel, folder: Path, **settings: object) -> Iterator[WeightTransfer]:
    shapes = [(name, tuple(tensor.shape)) for name, tensor in stream(model)]
    transfer = WeightTransfer(pool.control, VLLMConfig(**settings), shapes, model.dtype, folder)
    yield transfer
    transfer.close()


def differences(model: PreTrainedModel, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    own = torch.tensor(rollout.generation_logprobs)
    return (own - logprobs(model, PROMPTS[rollout.group].token_ids, rollout.token_ids, temperature)).abs()


def assert_samples_with(pool: Pool, model: PreTrainedModel, version: int, urls: Sequence[str]) -> None:
    """Twice: the second time the prompts are in the prefix cache."""
    for url in urls:
        pool.admit(url, version)
        for _ in range(2):
            for rollout in pool.submit(PROMPTS, request(), (), only=url).result():
                assert rollout.policy_version == version
                assert differences(model, rollout).max() < ROUNDING


def pushed_twice_and_again(url: str, old: PreTrainedModel, new: PreTrainedModel, folder: Path) -> None:
    """Through gloo, through a file, by a second trainer, and while requests are half done."""
    pool = Pool([url], VLLMConfig(), KEY, VOCAB)
    with transfer_of(pool, new, folder) as transfer:
        assert transfer.push([url], stream(new), 1) == Pushed(updated=(url,))
        assert_samples_with(pool, new, 1, [url])
        assert transfer.push([url], stream(old), 2) == Pushed(updated=(url,))
        assert_samples_with(pool, old, 2, [url])
    with transfer_of(pool, new, folder, weight_transfer="file") as transfer:
        assert transfer.push([url], stream(new), 3) == Pushed(updated=(url,))
        assert_samples_with(pool, new, 3, [url])
    with transfer_of(pool, new, folder) as transfer:  # another trainer, the same server
        assert transfer.push([url], stream(old), 4) == Pushed(updated=(url,))
        assert_samples_with(pool, old, 4, [url])
        push_in_flight(pool, transfer, url, old, new)
    pool.close()


def push_in_flight(
    pool: Pool,
    transfer: WeightTransfer,
    url: str,
    old: PreTrainedModel,
    new: PreTrainedModel,
    rounding: float = 1e-4,
) -> None:
    """Requests that a push finds half done: each token's log-prob is that of the weights that drew it.

    The server has the old weights as version 4.
    """
    for version, (before, after) in zip(range(5, 25), cycle([(old, new), (new, old)]), strict=False):
        done = pool.num_done
        work = pool.submit(PROMPTS * 4, request(max_tokens=80), (), only=url)
        wait_until(lambda done=done: pool.num_done > done)
        assert transfer.push([url], stream(after), version) == Pushed(updated=(url,))
        crossed = 0
        for rollout in work.result():
            prompt = PROMPTS[rollout.group % 4].token_ids
            own = torch.tensor(rollout.generation_logprobs)
            by_before, by_after = (
                (own - logprobs(m, prompt, rollout.token_ids)).abs() < rounding for m in (before, after)
            )
            num_before = int(by_before.long().cumprod(0).sum())
            assert by_after[num_before:].all()
            assert by_after.all() or rollout.policy_version == version - 1
            crossed += 0 < num_before < len(own)
        if crossed:
            return
    pytest.fail("twenty pushes found no request half done")  # one may: on a busy machine all can be over before it
