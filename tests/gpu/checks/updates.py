"""Updates of the 8B shape, and a plain transformers step beside them."""

import gc
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from tests.gpu.checks.common import (
    DEVICE,
    GPU,
    PEAK_TFLOPS,
    Report,
    Sizes,
    peak_gib,
    profile,
    require_transformer_engine,
    reset_peak,
    seconds_of,
    synchronize,
    waits,
)
from tests.support.layer_kinds import local_layers


class DeviceWeights:
    """Random weights that are drawn on the device: a host would take a minute for a shape of 8B."""

    def __init__(self, hf_config: Any) -> None:
        from nemo_jepo.actor.weights.load import hf_shapes

        self._shapes, self._range = hf_shapes(hf_config), hf_config.initializer_range

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """The whole tensor, or tensor[start:stop] along dim."""
        draw = torch.Generator(DEVICE).manual_seed(len(name) * 1000 + sum(name.encode()))
        if name.endswith("norm.weight"):
            tensor = torch.ones(self._shapes[name], device=DEVICE)
        else:
            tensor = torch.randn(self._shapes[name], generator=draw, device=DEVICE) * self._range
        return tensor if dim is None else tensor.narrow(dim, start, stop - start)


def shape_of(size: Sizes, layers: int) -> dict[str, Any]:
    """Llama 3.1 8B with fewer layers, or a toy on a CPU."""
    from benchmarks.h100 import workload

    return workload.MODELS["8b_shape"] | ({} if GPU else workload.TOY) | {"num_hidden_layers": layers}


def build_actor(shape: dict[str, Any], tokens: int, **settings: Any) -> Any:
    """A policy in bf16 that is ready to train."""
    from nemo_jepo.actor import parallel

    parallel.init_distributed()
    from nemo_jepo.actor.actor import MegatronJEPOActor
    from nemo_jepo.actor.model import load_hf_config
    from nemo_jepo.actor.weights.load import load_stage
    from nemo_jepo.config.schema import ModelConfig, OptimConfig

    model = ModelConfig(tokens_per_micro_batch=tokens, **settings)
    parallel.init_model_parallel(model)
    layout, hf_config = parallel.Layout(), load_hf_config(shape)
    actor = MegatronJEPOActor(hf_config, model, "bf16", layout)
    load_stage(actor.chunks, hf_config, DeviceWeights(hf_config), layout)
    actor.start_training(OptimConfig(lr=1e-5), 1.0, 1000)
    return actor


def batch_of(size: Sizes, tokens: int) -> list[Any]:
    """The sequences that every update reads."""
    from benchmarks.h100 import workload

    prompt, chain, answer = size.lengths
    return workload.batch_of(
        workload.Size(
            prompts=size.prompts,
            generations=size.generations,
            tokens_per_row=tokens,
            prompt_tokens=prompt,
            chain_tokens=chain,
            answer_tokens=answer,
        )
    )


def measure_updates(report: Report, size: Sizes, layers: int, rows_of: Sequence[int], **settings: Any) -> None:
    """Scoring and updates of the shape over rows of some sizes, and a profile of an update of two rows."""
    from benchmarks.h100 import workload
    from nemo_jepo.data.packing import pack

    shape = shape_of(size, layers)
    begin = perf_counter()
    actor = build_actor(shape, max(rows_of), **settings)
    synchronize()
    report["build_seconds"] = perf_counter() - begin
    report["parameters"] = sum(p.numel() for chunk in actor.chunks for p in chunk.parameters())
    report["layers"] = type(actor.chunks[0].decoder.layers[0].self_attention.core_attention).__name__
    sequences = batch_of(size, min(rows_of))
    weights = workload.mean_nll_weights(sequences)
    tokens, flops = sum(s.length for s in sequences), workload.model_flops(shape, sequences)
    report["tokens"], report["model_tflop"] = tokens, flops / 1e12
    for length in rows_of:
        rows = pack(sequences, replace(actor.row_shape, max_tokens=length, share_prompts=False))
        score = partial(actor.get_inference_log_probs, rows, len(sequences))
        score()
        losses = [actor.train_step(rows, weights)["surrogate_loss"]]
        reset_peak()
        scoring = seconds_of(score)
        update = seconds_of(
            lambda rows=rows, losses=losses: losses.append(actor.train_step(rows, weights)["surrogate_loss"]),
            size.updates,
        )
        found = {
            "rows": len(rows),
            "scoring_seconds": scoring,
            "update_seconds": update,
            "update_tokens_per_second": tokens / update,
            "update_tflops": flops / update / 1e12,
            "mfu": flops / update / 1e12 / PEAK_TFLOPS,
            "scoring_share_of_peak": flops / 3 / scoring / 1e12 / PEAK_TFLOPS,
            "peak_gib": peak_gib(),
            "losses": losses,
        }
        few, few_weights = rows[:2], workload.mean_nll_weights(sequences)

        def gradients(few: Sequence[Any] = few, few_weights: Sequence[Tensor] = few_weights) -> None:
            actor.prepare_for_training_step()
            actor.get_loss_and_metrics(few, few_weights)

        waited = waits(gradients)
        per_layer = sum(waited.values()) / (layers * len(few))
        report[f"rows of {length}"] = found | {
            "waits_per_layer_and_row": per_layer,
            "waits of two rows": waited,
            "waits of the optimizer": waits(actor.finish_training_step),
            "profile of two rows": profile(gradients),
            "profile of the optimizer": profile(actor.finish_training_step),
        }
        report.expect(losses[-1] < losses[0], f"rows of {length}: the loss falls")
        report.expect(not GPU or per_layer < 1, f"rows of {length}: less than one wait for the GPU a layer")


def most_layers(size: Sizes) -> int:
    """Twice as many where there is twice the memory: at 18 bytes a parameter 16 layers take 76 GiB."""
    return (
        2 * size.more_layers
        if GPU and torch.cuda.get_device_properties(0).total_memory > 120 * 2**30
        else size.more_layers
    )


def updates(report: Report, size: Sizes) -> None:
    """Updates of the 8B shape with few layers."""
    measure_updates(report, size, size.layers, size.rows)


def updates_more_layers(report: Report, size: Sizes) -> None:
    """The same with more layers: the difference is what layers cost, without output head and embedding."""
    measure_updates(report, size, most_layers(size), size.rows[-1:])


def updates_fp8(report: Report, size: Sizes, recipe: str) -> None:
    """The same in FP8."""
    require_transformer_engine()
    measure_updates(report, size, most_layers(size), size.rows[-1:], fp8="hybrid", fp8_recipe=recipe)


def whole_updates(report: Report, size: Sizes) -> None:
    """All that follows sampling: scores, reference scores, weights, one update. What a shared prompt and one forward
    pass save, and that the update stays the same."""
    from nemo_jepo.actor.scoring import score
    from nemo_jepo.config.schema import Config
    from nemo_jepo.data.packing import pack
    from nemo_jepo.objective.update import sample_weights, token_weights
    from nemo_jepo.setup import update_rule
    from nemo_jepo.types import SplicedBatch

    config = Config()
    rule = update_rule(config.objective, config.advantage, config.kl)
    sequences = batch_of(size, size.rows[-1])
    tokens = sum(s.length for s in sequences)
    expected: dict[str, float] = {}
    actor: Any = None
    for name, settings in {
        "two passes, prompts of their own": {"update_passes": "two", "share_prompts": False},
        "two passes, shared prompts": {"update_passes": "two"},
        "defaults": {},
        "defaults, reference policy on the GPU": {"reference_policy": "gpu"},
    }.items():
        del actor  # before the next one is built
        gc.collect()
        actor = build_actor(shape_of(size, size.layers), size.rows[-1], **settings)
        actor.keep_reference_policy()

        def update(actor: Any = actor) -> dict[str, float]:
            scored = score(actor, SplicedBatch(sequences=sequences, group_size=size.generations), for_update=True)
            weights = token_weights(rule, scored, sample_weights(rule, scored.groups))
            return actor.train_step(scored.rows, weights, scored.graph)

        first = update()
        reset_peak()
        seconds = seconds_of(update)
        peak = peak_gib()
        rows = pack(sequences, actor.row_shape)
        exchange = seconds_of(lambda actor=actor: actor._reference._exchange())
        actor._reference._exchange()  # an even number of times
        report[name] = {
            "rows": [len(row.token_ids) for row in rows],
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "peak_gib": peak,
            "one_pass": actor.keeps_graph(rows),
            "seconds_of_an_exchange": exchange,
            "bytes_a_token": actor._bytes_per_token,
            **first,
        }
        expected = expected or first
        off = abs(first["grad_norm"] / expected["grad_norm"] - 1)
        report.expect(off < 0.02, f"{name}: the gradient's norm is the first variant's within 2%")


def updates_local(report: Report, size: Sizes) -> None:
    """The same with local layers where Transformer Engine is installed."""
    require_transformer_engine()
    with local_layers():
        measure_updates(report, size, size.layers, size.rows[-1:])


def plain_transformers(report: Report, size: Sizes) -> None:
    """What a plain step of transformers does with the same shape and sequences: padded batches, whole logits.

    bf16 weights and AdamW states, SDPA attention, logits of every token, log-softmax in fp32 a sequence at a time: a
    policy-gradient step as TRL has it. It keeps no fp32 main weights and no fp32 gradients, so it needs less memory.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from benchmarks.h100 import workload

    shape = dict(shape_of(size, size.layers))
    sequences = batch_of(size, min(size.rows))
    tokens, flops = sum(s.length for s in sequences), workload.model_flops(shape, sequences)
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=GPU)
    scored = sum(s.chain_length + s.answer_length for s in sequences)

    def step(each: int) -> float:
        loss = 0.0
        for start in range(0, len(sequences), each):
            part = sequences[start : start + each]
            longest = max(s.length for s in part)
            ids = torch.tensor([[*s.token_ids, *[0] * (longest - s.length)] for s in part], device=DEVICE)
            mask = torch.tensor([[1] * s.length + [0] * (longest - s.length) for s in part], device=DEVICE)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            total = torch.zeros((), device=DEVICE)
            for number, s in enumerate(part):
                own = slice(s.prompt_length - 1, s.length - 1)
                log_p = logits[number, own].float().log_softmax(-1)
                total = total - log_p.gather(1, ids[number, s.prompt_length : s.length, None]).sum()
            (total / scored).backward()
            loss += float(total.detach()) / scored
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    for each in (2, 4):
        try:
            losses = [step(each)]
            reset_peak()
            seconds = seconds_of(lambda each=each, losses=losses: losses.append(step(each)), size.updates)
        except torch.OutOfMemoryError as error:
            report[f"{each} sequences a batch"] = str(error).splitlines()[0]
            continue
        report[f"{each} sequences a batch"] = {
            "update_seconds": seconds,
            "update_tokens_per_second": tokens / seconds,
            "mfu": flops / seconds / 1e12 / PEAK_TFLOPS,
            "peak_gib": peak_gib(),
            "losses": losses,
        }
