"""Step time of conf/jepo_70b.yaml on 16 to 1,024 H100, as the planner's model has it: a plot, no measurement.

python -m benchmarks.plan_scaling --out docs/images/plan_70b.png
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from nemo_jepo.config import compose  # noqa: E402
from nemo_jepo.tools.plan.estimate import Plan  # noqa: E402
from nemo_jepo.tools.plan.hardware import GPUS  # noqa: E402
from nemo_jepo.tools.plan.search import best_plan  # noqa: E402
from nemo_jepo.tools.plan.workload import MeanLengths  # noqa: E402

NODES = (2, 4, 8, 16, 32, 64, 128)
BATCHES = {"the paper's batch: 64 prompts x 4 samples": (64, 4), "512 prompts x 8 samples": (512, 8)}
PHASES = ("generation", "weight sync", "log-probs", "reference log-probs", "training", "other")


def plans(prompts: int, generations: int) -> list[Plan | None]:
    """The best plan at every size; None where nothing fits."""
    batch = [
        f"trainer.jepo.num_prompts_per_step={prompts}",
        f"trainer.jepo.num_generations_per_prompt={generations}",
    ]
    config = compose.resolve(compose.compose("jepo_70b", batch))
    found = [best_plan(config, GPUS["h100"], 8, nodes, MeanLengths()) for nodes in NODES]
    return [plan if plan and plan.fits else None for plan in found]


def draw(axes: Axes, title: str, found: list[Plan | None]) -> None:
    """Stacked phases at every size."""
    bottom = [0.0] * len(NODES)
    for phase in PHASES:
        heights = [plan.phase_seconds.get(phase, 0.0) if plan else 0.0 for plan in found]
        axes.bar(range(len(NODES)), heights, bottom=bottom, label=phase)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    for place, plan in enumerate(found):
        if plan is None:
            axes.text(place, max(bottom) * 0.02, "does not fit", rotation=90, ha="center", va="bottom", color="gray")
            continue
        cost = f"{plan.step_seconds:.0f} s\n{plan.gpu_hours:.1f} GPU h"
        axes.text(place, bottom[place], cost, ha="center", va="bottom", fontsize=8)
    axes.set_ylim(0, max(bottom) * 1.15)
    axes.set_xticks(range(len(NODES)), [str(8 * nodes) for nodes in NODES])
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("H100 GPUs, trainer and rollouts together")
    axes.set_ylabel("seconds a step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/images/plan_70b.png"))
    out = parser.parse_args().out
    figure, both = pyplot.subplots(1, len(BATCHES), figsize=(11, 4.6))
    for axes, (title, batch) in zip(both, BATCHES.items(), strict=True):
        found = plans(*batch)
        draw(axes, title, found)
        for nodes, plan in zip(NODES, found, strict=True):
            split = f"{plan.cluster.world_size} + {plan.rollout_gpus}" if plan else "-"
            print(f"{title}: {8 * nodes} GPUs ({split}): {f'{plan.step_seconds:.1f} s' if plan else 'does not fit'}")
    both[-1].legend(fontsize=8)
    figure.suptitle("Llama 3.1 70B, best layout found by nemo-jepo plan --search: a model, not a measurement")
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
