"""The embedded sampler against the model's own teacher-forced forward pass and against exact probabilities."""

import itertools
from collections.abc import Sequence

import numpy
import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from nemo_jepo.actor.weights.families import FAMILIES
from nemo_jepo.config.schema import RolloutConfig
from nemo_jepo.data.stream import Epochs, PromptStream
from nemo_jepo.rollout import cache, embedded
from nemo_jepo.rollout.embedded import EmbeddedSampler, draw_tokens
from nemo_jepo.rollout.sampler import GenerationRequest, SamplingStopped
from nemo_jepo.types import Prompt

EOS = 0
MARKER = (5, 7)


def ends_with_marker(token_ids: Sequence[int]) -> bool:
    return tuple(token_ids[-len(MARKER) :]) == MARKER


SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def tiny_config(vocab_size: int = 8) -> LlamaConfig:
    return LlamaConfig(vocab_size=vocab_size, **SHAPE)


def tiny_model(config: PretrainedConfig, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Weights large enough that the next-token distribution depends strongly on the context."""
    generator = torch.Generator().manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.1 * noise if parameter.dim() == 1 else 0.4 * noise)
    return model.eval().requires_grad_(False)


def sampler_of(model: PreTrainedModel, batch_size: int = 64) -> EmbeddedSampler:
    sampler = EmbeddedSampler(
        hf_config=model.config,
        rollout=RolloutConfig(batch_size=batch_size),
        eos_token_id=EOS,
        stop_after=ends_with_marker,
        device=torch.device("cpu"),
        dtype=model.dtype,
    )
    sampler.load_weights(model.named_parameters(), policy_version=3)
    return sampler


def prompt_of(prompt_id: int, *token_ids: int) -> Prompt:
    return Prompt(prompt_id=prompt_id, token_ids=token_ids, question="", answer="")


def request_of(**changes: object) -> GenerationRequest:
    settings = {
        "num_generations_per_prompt": 4,
        "max_tokens": 12,
        "stop_at_marker": False,
        "temperature": 1.0,
        "seed": 11,
    }
    return GenerationRequest(**(settings | changes))


RAGGED = (prompt_of(0, 1, 2, 3, 4, 5, 6), prompt_of(1, 3), prompt_of(2, 6, 1, 1), prompt_of(3, 2, 2, 7, 4))


def teacher_forced(
    model: PreTrainedModel, prompt: Sequence[int], completion: Sequence[int], temperature: float = 1.0
) -> torch.Tensor:
    """Log-probs of the completion's tokens by one forward pass without cache or padding."""
    logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(completion).unsqueeze(-1)).squeeze(-1)


def plain_loop(model: PreTrainedModel, prompt: Prompt, sample: int, request: GenerationRequest) -> tuple[int, ...]:
    """The completion, one forward pass over everything so far for each token: no cache, no padding, nothing beside."""
    uniforms = numpy.random.default_rng([request.seed, prompt.prompt_id, sample]).random(request.max_tokens)
    token_ids: list[int] = []
    for uniform in torch.from_numpy(uniforms).unsqueeze(-1):
        logits = model(input_ids=torch.tensor([[*prompt.token_ids, *token_ids]])).logits[:, -1]
        token_ids.append(int(draw_tokens((logits.double() / request.temperature).log_softmax(-1), uniform)))
        if token_ids[-1] == EOS or (request.stop_at_marker and ends_with_marker(token_ids)):
            break
    return tuple(token_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_tokens_of_a_plain_loop_and_the_logprobs_of_a_teacher_forced_pass(family):
    """Prompts of 1 to 6 tokens, siblings apart in two batches, rows that end early: nothing of it may show."""
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    if FAMILIES[family].experts is None:
        experts = {}
    config = AutoConfig.for_model(family, vocab_size=8, head_dim=8, **SHAPE, **experts)
    config._experts_implementation = "eager"  # the other ones have no float64
    model = tiny_model(config)
    request = request_of(temperature=0.8, stop_at_marker=True)
    rollouts = sampler_of(model, batch_size=7).generate(RAGGED, request)
    assert len({len(r.token_ids) for r in rollouts}) > 2
    for rollout in rollouts:
        prompt = RAGGED[rollout.group]
        assert rollout.token_ids == plain_loop(model, prompt, rollout.sample, request)
        expected = teacher_forced(model, prompt.token_ids, rollout.token_ids, request.temperature)
        torch.testing.assert_close(torch.tensor(rollout.generation_logprobs), expected.float(), atol=1e-5, rtol=0)


def test_a_long_prompt_beside_short_ones_and_a_completion_that_outgrows_its_room_change_nothing(monkeypatch):
    """Room for 2 columns at a time, prompts computed 8 tokens at a time, and one longer than attention's own blocks."""
    long = prompt_of(4, *(1 + i * i % 7 for i in range(700)))
    model, request = tiny_model(tiny_config()), request_of(num_generations_per_prompt=2, max_tokens=9, seed=2)
    expected = [plain_loop(model, prompt, sample, request) for prompt in (*RAGGED, long) for sample in range(2)]
    assert max(len(token_ids) for token_ids in expected) == 9
    monkeypatch.setattr(cache, "BLOCK", 2)
    monkeypatch.setattr(embedded, "PREFILL_TOKENS", 8)
    assert [r.token_ids for r in sampler_of(model).generate((*RAGGED, long), request)] == expected


def test_a_prompt_is_computed_once_for_all_of_its_samples_and_without_padding_by_a_longer_one(monkeypatch):
    """Prompts of 1, 3 and 4 tokens fit into 12 padded ones, that of 6 does not; the last tokens come with the rows."""
    monkeypatch.setattr(embedded, "PREFILL_TOKENS", 12)
    sampler, computed = sampler_of(tiny_model(tiny_config())), []
    layer = sampler._model.base_model.layers[0]
    layer.register_forward_pre_hook(lambda module, inputs: computed.append(tuple(inputs[0].shape[:2])))
    sampler.generate(RAGGED, request_of(num_generations_per_prompt=8, max_tokens=1))
    assert computed == [(3, 3), (1, 5), (32, 1)]


def test_room_is_made_in_blocks_and_a_smaller_batch_has_less(monkeypatch):
    monkeypatch.setattr(cache, "BLOCK", 4)
    layer, token = cache.Layer(num_rows=3, width=5), torch.ones(3, 2, 1, 8)
    for step in range(6):
        keys, values = layer.update(token * step, -token * step)
        assert keys.shape == values.shape == (3, 2, 6 + step, 8)
        assert layer.keys.shape[2] == (9 if step < 4 else 13)
    assert keys[0, 0, :, 0].tolist() == [0] * 5 + [0, 1, 2, 3, 4, 5]
    layer.batch_select_indices(torch.tensor([0, 2]))
    assert layer.keys.shape == layer.values.shape == (2, 2, 13, 8)


def test_the_callers_config_stays_what_it_was():
    config = tiny_config()
    before = config.to_dict(), config._attn_implementation
    model = AutoModelForCausalLM.from_config(tiny_config())
    EmbeddedSampler(config, RolloutConfig(), EOS, ends_with_marker, torch.device("cpu"), torch.bfloat16)
    assert (config.to_dict(), config._attn_implementation) == before
    assert model.config._attn_implementation == "sdpa"


def test_sampled_pairs_have_their_exact_probabilities():
    model = tiny_model(tiny_config(vocab_size=4))
    prompt, num_samples = prompt_of(0, 1, 3), 4000
    pairs = list(itertools.product(range(1, 4), range(4))) + [(EOS,)]
    exact = [float(teacher_forced(model, prompt.token_ids, pair).sum().exp()) for pair in pairs]
    assert sum(exact) == pytest.approx(1)

    def p_value(temperature: float) -> float:
        request = request_of(num_generations_per_prompt=num_samples, max_tokens=2, temperature=temperature)
        rollouts = sampler_of(model, 1000).generate([prompt], request)
        drawn = [rollout.token_ids for rollout in rollouts]
        return chisquare([drawn.count(pair) for pair in pairs], [p * num_samples for p in exact]).pvalue

    assert p_value(temperature=1.0) > 0.01
    assert p_value(temperature=1.3) < 1e-6  # the test can tell a wrong distribution


def test_temperature_zero_takes_the_likeliest_token_and_reports_the_policys_own_logprobs():
    model = tiny_model(tiny_config())
    for rollout in sampler_of(model).generate(RAGGED, request_of(num_generations_per_prompt=2, temperature=0.0)):
        prompt = RAGGED[rollout.group]
        likeliest: list[int] = []
        while len(likeliest) < len(rollout.token_ids):
            logits = model(input_ids=torch.tensor([[*prompt.token_ids, *likeliest]])).logits[0, -1]
            likeliest.append(int(logits.argmax()))
        assert rollout.token_ids == tuple(likeliest)
        assert len(likeliest) == 12 or likeliest[-1] == EOS
        expected = teacher_forced(model, prompt.token_ids, likeliest)
        torch.testing.assert_close(torch.tensor(rollout.generation_logprobs), expected.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("temperature", "own"), [(1.0, True), (0.5, False), (0.0, False)])
def test_a_rollout_says_whether_it_is_the_models_own(temperature, own):
    (rollout,) = sampler_of(tiny_model(tiny_config())).generate(
        RAGGED[:1], request_of(num_generations_per_prompt=1, max_tokens=1, temperature=temperature)
    )
    assert rollout.untempered == own
    assert not request_of(top_p=0.9).untempered and not request_of(top_k=5).untempered


def test_logprobs_are_at_the_sampling_temperature():
    model = tiny_model(tiny_config())
    request = request_of(num_generations_per_prompt=1, max_tokens=1, temperature=0.5)
    (rollout,) = sampler_of(model).generate([RAGGED[0]], request)
    logits = model(input_ids=torch.tensor([RAGGED[0].token_ids])).logits[0, -1]
    expected = (logits / 0.5).log_softmax(-1)[rollout.token_ids[0]]
    assert rollout.generation_logprobs[0] == pytest.approx(float(expected))


def test_a_rollout_does_not_depend_on_the_prompts_or_the_batch_size_beside_it():
    model = tiny_model(tiny_config())
    request = request_of()
    together = sampler_of(model).generate(RAGGED, request)
    of_prompt = {RAGGED[r.group].prompt_id: [] for r in together}
    for rollout in together:
        of_prompt[RAGGED[rollout.group].prompt_id].append(rollout.token_ids)
    reordered = sampler_of(model, batch_size=3).generate(RAGGED[::-1], request)
    for rollout in reordered:
        assert rollout.token_ids == of_prompt[RAGGED[::-1][rollout.group].prompt_id][rollout.sample]
    for prompt in RAGGED:
        alone = sampler_of(model).generate([prompt], request)
        assert [r.token_ids for r in alone] == of_prompt[prompt.prompt_id]


def test_siblings_steps_and_prompts_draw_different_numbers():
    sampler = sampler_of(tiny_model(tiny_config()))
    twins = (prompt_of(0, 1, 2), prompt_of(1, 1, 2))
    drawn = [r.token_ids for seed in (0, 1) for r in sampler.generate(twins, request_of(seed=seed, max_tokens=30))]
    assert len(set(drawn)) == len(drawn) == 16


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_a_prompt_twice_in_a_batch_draws_other_samples_on_any_number_of_replicas(replicas):
    """Two prompts, four places: both twice. The first occurrence draws what it does alone, the second samples 4 to 7 of
    the same prompt, and where a place is sampled changes nothing."""
    sampler = sampler_of(tiny_model(tiny_config()))
    prompts = (prompt_of(0, 1, 2), prompt_of(1, 3))
    batch = PromptStream(prompts, 4, Epochs(len(prompts), shuffle=False, seed=0)).upcoming()
    size = len(batch) // replicas
    drawn = [
        [rollout.token_ids for rollout in sampler.generate(batch[start : start + size], request_of(max_tokens=30))]
        for start in range(0, 4, size)
    ]
    found = [token_ids for of_replica in drawn for token_ids in of_replica]
    alone = sampler.generate(prompts, request_of(max_tokens=30, num_generations_per_prompt=8))
    samples = [rollout.token_ids for rollout in alone]
    assert samples[0:4] != samples[4:8] and samples[8:12] != samples[12:16]
    assert found == samples[0:4] + samples[8:12] + samples[4:8] + samples[12:16]


def test_rollouts_are_ordered_and_carry_the_policy_version():
    rollouts = sampler_of(tiny_model(tiny_config()), batch_size=5).generate(RAGGED, request_of())
    assert [(r.group, r.sample) for r in rollouts] == list(itertools.product(range(4), range(4)))
    assert {r.policy_version for r in rollouts} == {3}


def test_a_completion_ends_with_the_end_of_turn_id_or_at_max_tokens():
    rollouts = sampler_of(tiny_model(tiny_config())).generate(RAGGED, request_of(num_generations_per_prompt=32))
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}
    assert any(r.token_ids == (EOS,) for r in rollouts)  # drawn as the first token
    for r in rollouts:
        assert len(r.generation_logprobs) == len(r.token_ids)
        assert EOS not in r.token_ids[:-1]
        assert (r.finish_reason == "stop") == (r.token_ids[-1] == EOS)
        assert r.finish_reason == "stop" or len(r.token_ids) == 12


def test_a_shorter_limit_gives_a_prefix_of_the_same_completion():
    sampler = sampler_of(tiny_model(tiny_config()))
    long, short = (sampler.generate(RAGGED, request_of(max_tokens=n)) for n in (12, 5))
    assert [r.token_ids for r in short] == [r.token_ids[:5] for r in long]


def test_stop_at_marker_cuts_right_after_the_first_marker():
    sampler = sampler_of(tiny_model(tiny_config()))
    request = {"num_generations_per_prompt": 64, "max_tokens": 20}
    free = sampler.generate(RAGGED, request_of(**request))
    stopped = sampler.generate(RAGGED, request_of(**request, stop_at_marker=True))

    def up_to_marker(token_ids: tuple[int, ...]) -> tuple[int, ...]:
        ends = [n for n in range(len(token_ids) + 1) if token_ids[n - 2 : n] == MARKER]
        return token_ids[: ends[0]] if ends else token_ids

    assert [r.token_ids for r in stopped] == [up_to_marker(r.token_ids) for r in free]
    cut = [r for r, whole in zip(stopped, free, strict=True) if len(r.token_ids) < len(whole.token_ids)]
    assert cut and all(r.finish_reason == "stop" and ends_with_marker(r.token_ids) for r in cut)


def test_global_random_state_is_untouched():
    model = tiny_model(tiny_config())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sampler_of(model).generate(RAGGED, request_of())
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_an_id_of_probability_zero_is_never_drawn(uniform):
    """Sums of many random rows, some of them powers of two: u * sum must not round up to the sum."""
    logits = torch.randn(2000, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[:, ::2] = -torch.inf
    logits[:, -9:] = -torch.inf
    logits[:3, 1:] = -torch.inf
    logits[:3, 5] = 0.0
    token_logprobs = logits.log_softmax(-1)
    drawn = draw_tokens(token_logprobs, torch.full((2000,), uniform, dtype=torch.float64))
    assert bool(token_logprobs.gather(-1, drawn.unsqueeze(-1)).isfinite().all())


def test_the_inverse_cdf_maps_each_interval_to_its_id():
    probabilities = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 0.9999], dtype=torch.float64)
    drawn = draw_tokens(probabilities.log().expand(6, 3), uniforms)
    assert drawn.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_sampler_told_to_stop_draws_no_further_batch():
    """Two samples a batch: asked before each, it is told to stop at the third question."""
    answers = iter([False, False, True])
    with pytest.raises(SamplingStopped, match=f"4 of {4 * len(RAGGED)} samples drawn"):
        sampler_of(tiny_model(tiny_config()), batch_size=2).submit(RAGGED, request_of(), lambda: next(answers)).result()


def test_loading_names_a_missing_an_unknown_and_a_misshaped_parameter():
    model = tiny_model(tiny_config())
    sampler = sampler_of(model)
    weights = dict(model.named_parameters())
    assert "lm_head.weight" not in weights  # tied
    norm = weights["model.norm.weight"]
    without_norm = {name: tensor for name, tensor in weights.items() if name != "model.norm.weight"}
    with pytest.raises(ValueError, match="no weights for 1 parameters: model.norm.weight"):
        sampler.load_weights(without_norm.items(), 4)
    with pytest.raises(ValueError, match="lm_head.weight: .* no such parameter"):
        sampler.load_weights({"lm_head.weight": norm}.items(), 4)
    with pytest.raises(ValueError, match=r"model.norm.weight: shape \[15\], expected \[16\]"):
        sampler.load_weights({"model.norm.weight": norm[:15]}.items(), 4)
    with pytest.raises(ValueError, match="came twice"):
        sampler.load_weights([("model.norm.weight", norm)] * 2, 4)
    with pytest.raises(RuntimeError, match="load_weights"):  # half-loaded weights are never sampled from
        sampler.generate(RAGGED, request_of())


def test_new_weights_change_what_is_sampled():
    model = tiny_model(tiny_config())
    sampler = sampler_of(model)
    before = sampler.generate(RAGGED, request_of())
    sampler.load_weights(((name, -tensor) for name, tensor in model.named_parameters()), policy_version=4)
    after = sampler.generate(RAGGED, request_of())
    assert {r.policy_version for r in after} == {4}
    assert [r.token_ids for r in after] != [r.token_ids for r in before]


def test_an_empty_prompt_and_an_empty_request_are_errors():
    sampler = sampler_of(tiny_model(tiny_config()))
    with pytest.raises(ValueError, match="at least one token"):
        sampler.generate([prompt_of(0)], request_of())
    with pytest.raises(ValueError, match="at least 1 generation"):
        request_of(max_tokens=0)
