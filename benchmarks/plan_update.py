"""What fitted rows, shared prompts and one forward pass do to an update of 8B and 70B: a model, no measurement.

python -m benchmarks.plan_update
"""

from collections.abc import Sequence

from benchmarks import report
from nemo_jepo.config import compose
from nemo_jepo.tools.plan.calibration import OURS, Software
from nemo_jepo.tools.plan.estimate import Plan, cluster_of, estimate
from nemo_jepo.tools.plan.hardware import GIB, GPUS
from nemo_jepo.tools.plan.workload import MeanLengths

RECIPES = {"jepo_8b": 0, "jepo_70b": 8}
"""conf file -> nodes that sample. That of 70B has pipeline stages, which need two forward passes."""
ONE_PASS = "one forward pass"
AS_IT_WAS = Software(head_products=4)
"""Rows of fixed length, each sample with its prompt, logits of the output head computed again."""
SMALL = "model.tokens_per_micro_batch=4096"
APART = ("model.share_prompts=false", "model.update_passes=two", SMALL)
VARIANTS = {
    "rows of 4,096, a prompt a sample": (APART, AS_IT_WAS),
    "rows as long as their content, 3 products in the head": (APART, OURS),
    "a prompt for its samples": ((SMALL,), OURS),
    "the same in the recipe's rows": ((), OURS),
    ONE_PASS: (("model.update_passes=one",), OURS),
}


def planned(name: str, overrides: Sequence[str], software: Software) -> Plan:
    """The recipe on its H100 nodes; lengths are half of the longest."""
    config = compose.resolve(compose.compose(name, overrides))
    cluster = cluster_of(config, GPUS["h100"], 8, None, RECIPES[name])
    return estimate(config, cluster, MeanLengths(), software)


def cells(plan: Plan) -> list[str]:
    """Tokens, seconds of the phases, and the memory of the fullest trainer GPU."""
    seconds = plan.phase_seconds
    phases = [seconds[name] for name in ("log-probs", "reference log-probs", "training")]
    computed = plan.rows.count * plan.rows.tokens * plan.replicas
    fullest = max(phase.total for phase in plan.trainer_memory) / GIB
    times = [f"{value:.1f}" for value in (*phases, sum(phases), plan.step_seconds)]
    return [f"{computed:,.0f}", *times, f"{fullest:,.0f}" + ("" if plan.fits else ", does not fit")]


def main() -> None:
    """Both recipes as tables."""
    for name in RECIPES:
        rows = [[name, "tokens computed", "log-probs", "reference", "training", "update", "step", "GiB a trainer GPU"]]
        for variant, settings in VARIANTS.items():
            if name != "jepo_70b" or variant != ONE_PASS:
                rows.append([variant, *cells(planned(name, *settings))])
        print(report.table(rows), end="\n\n")


if __name__ == "__main__":
    main()
