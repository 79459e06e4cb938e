"""Published figures and what the planner says of the same run.

NeMo-RL: "Reinforcement Learning with NVIDIA NeMo-RL: Megatron-Core Support for Optimized Training Throughput", NVIDIA
developer blog, 20 August 2025, tables 1 and 2, averages over steps 22-29, H100, BF16. Stated there: 2,048 sequences
a step in updates of 512, sequences packed into 4,096 tokens, mean generated tokens, training layouts. From NeMo-RL's
configs examples/configs/grpo_math_8B_megatron.yaml and grpo_math_70B_megatron.yaml: 64 prompts of 32 generations, vLLM
with tensor parallelism 1 (8B) and 4 (70B), trainer and vLLM on the same GPUs. Assumed here: prompts of 200 tokens, "Get
logprobs" is policy and reference policy, tensor parallelism 4 for vLLM of the Qwen3 models.

H200: docs/results/h200.md, updates with Transformer Engine in rows of 8,192 (training alone, six padded rows, a head of
four products).

Megatron-Bridge: docs/performance-summary.md, DGX-H100 and DGX-B200, containers 25.11 and 26.02, sequences of 8,192
(Qwen3: 4,096) tokens, FP8 with current scaling. Assumed here: sequence parallelism where tensor parallelism is.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nemo_jepo.config.schema import ModelConfig
from nemo_jepo.tools.plan.calibration import MEGATRON_BRIDGE, NEMO_RL, OTHER_SECONDS, Software
from nemo_jepo.tools.plan.generation import Sampler
from nemo_jepo.tools.plan.hardware import GIB, GPUS
from nemo_jepo.tools.plan.memory import sampler_memory
from nemo_jepo.tools.plan.shape import ModelShape, shape_of
from nemo_jepo.tools.plan.training import Trainer
from nemo_jepo.tools.plan.workload import Generations, Workload

_LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8}
_QWEN = {"vocab_size": 151936, "head_dim": 128}
_MOE = _QWEN | {"model_type": "qwen3_moe", "intermediate_size": 1, "num_experts": 128, "num_experts_per_tok": 8,
                "num_key_value_heads": 4}  # fmt: skip


def _shape(base: dict[str, Any], layers: int, hidden: int, heads: int, width: int, **more: Any) -> ModelShape:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    width_key = "moe_intermediate_size" if base is _MOE else "intermediate_size"
    return shape_of(base | sizes | {width_key: width} | more)


SHAPES = {
    "Llama 8B": _shape(_LLAMA, 32, 4096, 32, 14336),
    "Llama 70B": _shape(_LLAMA, 80, 8192, 64, 28672),
    "Llama 405B": _shape(_LLAMA, 126, 16384, 128, 53248),
    "Qwen3 32B": _shape(_QWEN | {"model_type": "qwen3"}, 64, 5120, 64, 25600, num_key_value_heads=8),
    "Qwen3 30B-A3B": _shape(_MOE, 48, 2048, 32, 768),
    "Qwen3 235B-A22B": _shape(_MOE, 94, 4096, 64, 1536),
}


@dataclass(frozen=True)
class Pretraining:
    """Megatron-Bridge: a global batch of whole sequences."""

    shape: str
    gpu: str
    num_gpus: int
    batch: int
    sequence: int
    layout: tuple[int, int, int, int | None, int]
    """TP, PP, CP, VP, EP."""
    tokens_per_second: float
    """Published, a GPU."""
    micro_batch: int = 1

    def modelled(self) -> float:
        """Tokens a second a GPU."""
        tensor, pipeline, context, chunks, expert = self.layout
        model = ModelConfig(
            tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, context_parallel_size=context,
            virtual_pipeline_model_parallel_size=chunks, expert_model_parallel_size=expert, fp8="hybrid",
            sequence_parallel=tensor > 1, tokens_per_micro_batch=self.sequence * self.micro_batch,
        )  # fmt: skip
        if self.shape == "Llama 405B":  # 126 layers on 8 stages: Megatron counts embedding and head as two more
            model.num_layers_in_first_pipeline_stage = model.num_layers_in_last_pipeline_stage = 15
            model.virtual_pipeline_model_parallel_size = 8
        if self.shape == "Qwen3 235B-A22B":
            model.num_layers_in_first_pipeline_stage = model.num_layers_in_last_pipeline_stage = 11
        trainer = Trainer(SHAPES[self.shape], model, GPUS[self.gpu], self.num_gpus, 8, MEGATRON_BRIDGE)
        whole = Generations(self.sequence, self.sequence)
        work = Workload(self.batch, 1, 0, whole, 0, self.sequence, packing_fill=1.0)
        return work.trained_tokens / sum(trainer.training(work, "bf16").values()) / self.num_gpus


PRETRAINING = {
    "Llama 3 8B, 8 H100": Pretraining("Llama 8B", "h100", 8, 128, 8192, (1, 1, 1, None, 1), 14451),
    "Llama 3 8B, 8 B200": Pretraining("Llama 8B", "b200", 8, 128, 8192, (1, 1, 1, None, 1), 30624, 2),
    "Llama 3 70B, 64 H100, batch 128": Pretraining("Llama 70B", "h100", 64, 128, 8192, (4, 8, 1, 5, 1), 1602),
    "Llama 3 70B, 64 H100, batch 256": Pretraining("Llama 70B", "h100", 64, 256, 8192, (4, 8, 1, 5, 1), 1621),
    "Llama 3.1 405B, 1024 H100, batch 512": Pretraining("Llama 405B", "h100", 1024, 512, 8192, (8, 8, 2, 8, 1), 292),
    "Llama 3.1 405B, 1024 H100, batch 1536": Pretraining("Llama 405B", "h100", 1024, 1536, 8192, (8, 8, 2, 8, 1), 311),
    "Qwen3 30B-A3B, 16 H100": Pretraining("Qwen3 30B-A3B", "h100", 16, 512, 4096, (1, 2, 1, 24, 8), 5275, 2),
    "Qwen3 235B-A22B, 256 H100": Pretraining("Qwen3 235B-A22B", "h100", 256, 2048, 4096, (2, 8, 1, 4, 32), 1575),
}


@dataclass(frozen=True)
class GRPO:
    """NeMo-RL: phases of a step, trainer and samplers taking turns on all GPUs."""

    shape: str
    num_gpus: int
    generated: int
    longest: int
    layout: tuple[int, int, int, int]
    """TP, PP, CP, EP of the trainer."""
    sampler_gpus: int
    seconds: dict[str, float]
    """Published. A refit hands weights over on the same GPU, which this project does not, so it is not modelled."""
    prompt: int = 200

    def modelled(self) -> dict[str, float]:
        """Seconds by phase."""
        tensor, pipeline, context, expert = self.layout
        shape, gpu = SHAPES[self.shape], GPUS["h100"]
        model = ModelConfig(
            tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, context_parallel_size=context,
            expert_model_parallel_size=expert, sequence_parallel=tensor > 1, tokens_per_micro_batch=self.longest,
        )  # fmt: skip
        lengths = Generations(self.generated, self.longest - self.prompt)
        work = Workload(64, 32, self.prompt, lengths, 0, self.longest, num_updates=4)
        trainer = Trainer(shape, model, gpu, self.num_gpus, 8, NEMO_RL)
        memory = sampler_memory(shape, self.sampler_gpus, 0.6, self.longest, gpu.memory, 2)
        assert memory.phase.short <= GIB
        servers = self.num_gpus // self.sampler_gpus
        sampler = Sampler(shape, gpu, servers, self.sampler_gpus, memory.cached_tokens, 1024)
        seconds = {
            "training": sum(trainer.training(work, "bf16").values()),
            "generation": sum(sampler.seconds(work).values()),
            "log-probs": 2 * sum(trainer.scoring(work).values()),
        }
        return seconds | {"step": sum(seconds.values()) + self.seconds["refit"] + OTHER_SECONDS}


@dataclass(frozen=True)
class OneGPU:
    """This project's update of a Llama 8B with fewer layers: 32 sequences, 41,755 tokens, 36,447 of them scored."""

    layers: int
    fp8: str | None
    seconds: float
    """Measured."""

    def modelled(self) -> float:
        """Seconds."""
        model = ModelConfig(tokens_per_micro_batch=8192, fp8=self.fp8)
        then = Software(head_products=4)
        trainer = Trainer(_shape(_LLAMA, self.layers, 4096, 32, 14336), model, GPUS["h200"], 1, 8, then)
        scored, prompt = 36447 / 32, (41755 - 36447) / 32
        work = Workload(32, 1, prompt, Generations(scored, round(scored)), 0, 8192, packing_fill=1.0)
        return sum(trainer.training(work, "bf16").values())


UPDATES = {
    "4 layers, 1 H200": OneGPU(4, None, 0.864),
    "16 layers, 1 H200": OneGPU(16, None, 2.250),
    "16 layers in FP8, 1 H200": OneGPU(16, "hybrid", 1.842),
}


def _phases(training: float, refit: float, generation: float, logprobs: float, step: float) -> dict[str, float]:
    return {"training": training, "refit": refit, "generation": generation, "log-probs": logprobs, "step": step}


GRPO_RUNS = {
    "Llama 3.1 8B, 8 H100": GRPO("Llama 8B", 8, 795, 4096, (1, 1, 1, 1), 1, _phases(28, 5, 58, 18, 112)),
    "Llama 3.1 70B, 64 H100": GRPO("Llama 70B", 64, 398, 4096, (4, 4, 1, 1), 4, _phases(28, 14, 84, 18, 147)),
    "Llama 3.3 70B, 128 H100, 16k": GRPO("Llama 70B", 128, 749, 16384, (4, 4, 4, 1), 4, _phases(64, 17, 287, 75, 445)),
    "Qwen3 32B, 64 H100": GRPO("Qwen3 32B", 64, 3283, 4096, (4, 2, 1, 1), 4, _phases(68, 7, 96, 40, 213)),
    "Qwen3 30B-A3B, 64 H100": GRPO("Qwen3 30B-A3B", 64, 3251, 4096, (2, 1, 1, 8), 4, _phases(50, 12, 78, 23, 167)),
}


FITTED = {
    ("Llama 3 8B, 8 H100", "tokens/s/GPU"),
    *(("Llama 3.1 8B, 8 H100", phase) for phase in ("training", "generation")),
    ("Llama 3.1 8B, 8 H100", "step"),
    ("Qwen3 30B-A3B, 64 H100", "training"),
}
"""What constants of nemo_jepo.tools.plan.calibration were fitted to."""


def lines() -> Iterator[str]:
    """Every number as a line of the planner page: published, modelled, error; a star where a constant was fitted."""
    for name, run in PRETRAINING.items():
        yield _line(name, "tokens/s/GPU", "", run.tokens_per_second, run.modelled())
    for name, grpo in GRPO_RUNS.items():
        modelled = grpo.modelled()
        for phase, seconds in modelled.items():
            yield _line(name, phase, " (s)", grpo.seconds[phase], seconds)
    for name, update in UPDATES.items():
        yield _line(name, "update", " (s)", update.seconds, update.modelled(), digits=2)


def _line(name: str, what: str, unit: str, published: float, modelled: float, digits: int = 1) -> str:
    digits, star = 0 if modelled >= 100 else digits, " *" if (name, what) in FITTED else ""
    error = f"{100 * (modelled / published - 1):+.0f}%".replace("-0%", "+0%")
    return f"| {name} | {what}{unit}{star} | {published:,} | {modelled:,.{digits}f} | {error} |"


if __name__ == "__main__":
    print(*lines(), sep="\n")
