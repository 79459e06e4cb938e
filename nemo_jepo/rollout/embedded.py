"""The sampler of one process: a transformers model with this project's cache and attention, beside the actor.

N rows decoded together, V vocabulary. A prompt is computed once for all of its samples, which copy its keys and values;
finished rows leave the batch once they are a quarter of it. CPU seconds on one core, beside transformers' `generate`,
which does neither and keeps no log-probs (`python -m benchmarks.peers --parts sampling` measures them again):

    0.7M parameters, 32 prompts x 8, completions of 24 to 48 tokens    0.55 (generate 1.18)
    5M parameters, 64 prompts of 16 to 64 tokens, 64 new tokens each   1.60 (generate 2.70, a plain PyTorch loop 1.77)
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PretrainedConfig

from nemo_jepo.config.schema import RolloutConfig
from nemo_jepo.rollout.cache import GROUPED, Layer
from nemo_jepo.rollout.sampler import GenerationRequest, SamplingStopped, never
from nemo_jepo.types import FinishReason, Prompt, Rollout

PREFILL_TOKENS = 1024
"""Prompts are computed together up to so many tokens, padding included: a bound on memory, and little padding."""


def draw_tokens(token_logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """One token id per row by inverse transform sampling.

        id = min { v : sum_{w <= v} p_w > u * sum_w p_w }

    The inequality is strict, and u <= 1 - 2^-53 keeps its right side below the sum in float64 (rounding to nearest), so
    an id of probability 0 is never drawn.

    Args:
        token_logprobs: [N, V] float64, nats.
        uniforms: [N] float64 in [0, 1).
    Returns:
        [N] int64.
    """
    cumulative = token_logprobs.exp().cumsum(dim=-1)
    return torch.searchsorted(cumulative, uniforms.unsqueeze(-1) * cumulative[:, -1:], right=True).squeeze(-1)


@dataclass(slots=True)
class _Row:
    """One completion in the making."""

    group: int
    sample: int
    prompt: tuple[int, ...]
    uniforms: numpy.ndarray
    """[max_tokens] float64: every random number that this completion can use."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason = "length"


class _Batch:
    """The rows that are decoded together, their cache, and what the model is given beside it."""

    def __init__(self, rows: list[_Row], num_layers: int, device: torch.device, dtype: torch.dtype) -> None:
        lengths = torch.tensor([len(row.prompt) for row in rows]).unsqueeze(-1)
        width = int(lengths.max()) - 1
        columns = torch.arange(width + len(rows[0].uniforms))
        gap = (columns >= lengths - 1) & (columns < width)
        mask = torch.zeros(gap.shape, dtype=dtype).masked_fill_(gap, torch.finfo(dtype).min)
        self.rows = rows
        self.width = width
        self.cache = Cache(layers=[Layer(len(rows), width) for _ in range(num_layers)])
        self.newest = torch.tensor([row.prompt[-1:] for row in rows], device=device)  # [N, 1]
        self.positions = (lengths - 1).to(device)  # [N, 1], of the prompt's last token
        self.mask = mask[:, None, None].to(device)  # [N, 1, 1, columns], added to attention scores
        self.uniforms = torch.from_numpy(numpy.stack([row.uniforms for row in rows])).to(device)  # [N, max_tokens]

    def keep(self, indices: list[int]) -> None:
        """Drops every other row."""
        index = torch.tensor(indices, device=self.newest.device)
        self.rows = [self.rows[i] for i in indices]
        self.cache.batch_select_indices(index)
        self.newest, self.positions = self.newest[index], self.positions[index]
        self.mask, self.uniforms = self.mask[index], self.uniforms[index]


def _prefilled_together(rows: list[_Row]) -> Iterator[list[list[_Row]]]:
    """The rows, which are sorted by the length of their prompts, as lists of groups of siblings."""
    groups: list[list[_Row]] = []
    for _, siblings in itertools.groupby(rows, key=lambda row: row.group):
        group = list(siblings)
        if groups and (len(groups) + 1) * len(group[0].prompt) > PREFILL_TOKENS:
            yield groups
            groups = []
        groups.append(group)
    yield groups


class EmbeddedSampler:
    """Samples with a transformers model in this process; see `nemo_jepo.rollout.sampler.Sampler`.

    Args:
        hf_config: the model's shape; the weights come by `load_weights`.
        rollout: batch_size is read.
        eos_token_id: the end-of-turn id; a completion ends with it.
        stop_after: true of the generated ids so far when a completion that stops at the marker is complete.
        device: where the model lives.
        dtype: of weights and activations; probabilities are always float64.
    """

    def __init__(
        self,
        hf_config: PretrainedConfig,
        rollout: RolloutConfig,
        eos_token_id: int,
        stop_after: Callable[[Sequence[int]], bool],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        own_config = copy.deepcopy(hf_config)  # making a model writes into it
        # The random initialisation is overwritten: it must not cost random numbers.
        with torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_config(own_config, dtype=dtype, attn_implementation=GROUPED)
        self._model = model.requires_grad_(False).eval().to(device)
        self._rollout = rollout
        self._eos_token_id = eos_token_id
        self._stop_after = stop_after
        self._device = device
        self._policy_version: int | None = None

    @torch.no_grad()
    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], policy_version: int) -> bool:
        """Copies every parameter in; until that has succeeded there is nothing to sample from. See `Sampler`."""
        self._policy_version = None
        waiting = dict(self._model.named_parameters())
        for name, tensor in named_tensors:
            if name not in waiting:
                raise ValueError(f"{name}: the sampled model has no such parameter, or it came twice")
            parameter = waiting.pop(name)
            if parameter.shape != tensor.shape:
                raise ValueError(f"{name}: shape {list(tensor.shape)}, expected {list(parameter.shape)}")
            parameter.copy_(tensor)
        if waiting:
            raise ValueError(f"no weights for {len(waiting)} parameters: {', '.join(sorted(waiting)[:5])}")
        self._policy_version = policy_version
        return False

    def submit(
        self, prompts: Sequence[Prompt], request: GenerationRequest, stop: Callable[[], bool] = never
    ) -> "Future[list[Rollout]]":
        """The rollouts, drawn before this returns. See `Sampler`."""
        drawn: Future[list[Rollout]] = Future()
        try:
            drawn.set_result(self.generate(prompts, request, stop))
        except SamplingStopped as stopped:
            drawn.set_exception(stopped)
        return drawn

    def probe(self, prompts: Sequence[Prompt], request: GenerationRequest) -> dict[str, list[Rollout]]:
        """Nothing: the weights were copied inside this process, and every step logs logprob_difference."""
        return {}

    def counts(self) -> dict[str, float]:
        """Nothing: what fails here ends the run."""
        return {}

    def close(self) -> None:
        """See `Sampler`."""

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Prompt], request: GenerationRequest, stop: Callable[[], bool] = never
    ) -> list[Rollout]:
        """Completes every prompt G times, ordered by (group, sample). See `Sampler`.

        Raises:
            SamplingStopped: `stop`, which is asked before every batch, said so.
            RuntimeError: no weights were loaded.
            ValueError: a prompt without tokens.
        """
        if self._policy_version is None:
            raise RuntimeError("load_weights must succeed before generate")
        rows = [
            _Row(group, sample, prompt.token_ids, _uniforms(request, prompt, sample))
            for group, prompt in enumerate(prompts)
            for sample in range(request.num_generations_per_prompt)
        ]
        if not all(row.prompt for row in rows):
            raise ValueError("a prompt needs at least one token")
        by_length = sorted(rows, key=lambda row: len(row.prompt))  # little padding
        for start in range(0, len(rows), self._rollout.batch_size):
            if stop():
                raise SamplingStopped(f"told to stop with {start} of {len(rows)} samples drawn")
            self._decode(by_length[start : start + self._rollout.batch_size], request)
        return [
            Rollout(
                group=row.group,
                sample=row.sample,
                token_ids=tuple(row.token_ids),
                generation_logprobs=tuple(row.logprobs),
                finish_reason=row.finish_reason,
                policy_version=self._policy_version,
                untempered=request.untempered,
            )
            for row in rows
        ]

    def _decode(self, rows: list[_Row], request: GenerationRequest) -> None:
        """Fills the rows in, one token each per step; finished rows leave the batch once they are a quarter of it."""
        batch = _Batch(rows, self._model.config.num_hidden_layers, self._device, self._model.dtype)
        self._prefill(batch)
        for step in range(request.max_tokens):
            logits = self._model(
                input_ids=batch.newest,
                attention_mask=batch.mask[..., : batch.width + step + 1],
                position_ids=batch.positions + step,
                past_key_values=batch.cache,
            ).logits[:, -1]
            token_logprobs = (logits.double() / (request.temperature or 1.0)).log_softmax(dim=-1)
            is_greedy = request.temperature == 0
            drawn = token_logprobs.argmax(-1) if is_greedy else draw_tokens(token_logprobs, batch.uniforms[:, step])
            batch.newest = drawn.unsqueeze(-1)
            logprobs = token_logprobs.gather(-1, batch.newest).squeeze(-1)
            for row, token_id, logprob in zip(batch.rows, drawn.tolist(), logprobs.tolist(), strict=True):
                if row.finish_reason != "stop":
                    row.token_ids.append(token_id)
                    row.logprobs.append(logprob)
                    if self._is_complete(row, request):
                        row.finish_reason = "stop"
            running = [i for i, row in enumerate(batch.rows) if row.finish_reason != "stop"]
            if not running:
                return
            if len(running) <= 0.75 * len(batch.rows):
                batch.keep(running)

    def _prefill(self, batch: _Batch) -> None:
        """Computes each prompt without its last token, once for all of its samples."""
        first_row = 0
        for groups in _prefilled_together(batch.rows):
            prompts = [siblings[0].prompt[:-1] for siblings in groups]
            copies = torch.tensor([i for i, siblings in enumerate(groups) for _ in siblings], device=self._device)
            width = len(prompts[-1])
            if width:
                computed = DynamicCache()
                self._model.base_model(
                    # What follows a prompt is not seen by it: any id of the vocabulary will do.
                    input_ids=torch.tensor([ids + (0,) * (width - len(ids)) for ids in prompts], device=self._device),
                    position_ids=torch.arange(width, device=self._device).unsqueeze(0),
                    past_key_values=computed,
                )
                for layer, of_prompts in zip(batch.cache.layers, computed.layers, strict=True):
                    layer.put_prompts(first_row, copies, of_prompts)
            first_row += len(copies)

    def _is_complete(self, row: _Row, request: GenerationRequest) -> bool:
        """Whether the newest token ends the row by itself."""
        if row.token_ids[-1] == self._eos_token_id:
            return True
        return request.stop_at_marker and self._stop_after(row.token_ids)


def _uniforms(request: GenerationRequest, prompt: Prompt, sample: int) -> numpy.ndarray:
    """[max_tokens] float64 in [0, 1): a stream of its own for each completion; a longer request extends it.

    G samples of a prompt's k-th occurrence in a batch are samples k G to k G + G - 1 of the prompt.
    """
    number = prompt.occurrence * request.num_generations_per_prompt + sample
    return numpy.random.default_rng([request.seed, prompt.prompt_id, number]).random(request.max_tokens)
