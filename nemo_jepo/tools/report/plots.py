"""Which plots an experiment's results make, and the lines of each panel; `nemo_jepo.tools.report.drawings` draws them.

A panel is a regime. Every line is a mean over seeds, every band reaches from the smallest to the largest seed; a
caption says so and how many seeds there were.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nemo_jepo.tools.report.results import Comparison, key_and_number, votes

LABELS = {
    "oracle_accuracy": "held-out accuracy (oracle)",
    "accuracy": "held-out accuracy (exact match)",
    "oracle_accuracy_verifiable": "held-out accuracy (oracle)",
    "oracle_accuracy_unverifiable": "held-out accuracy (oracle)",
    "consistent_accuracy": "pairs with both judgements right (share)",
    "one_sided_rate": "pairs with one judgement right (share)",
    "kl": "KL to the reference policy (nats)",
    "bound": "bound (nats an answer)",
    "proxy_nll": "held-out proxy NLL (nats an answer)",
    "cot_tokens_mean": "chain of thought (tokens)",
    "chain_gain": "chain gain (nats an answer)",
    "train_rollouts/reasoning_tokens_mean": "before the marker, in training (tokens)",
    "train_rollouts/verdict_yes_rate": "right among own answers, in training",
    "train_rollouts/verdict_accuracy": "verdicts that are right, in training",
    "chosen": "right answers chosen (share)",
    "samples": "samples a problem",
    "step": "updates",
    "epoch": "epochs",
    "n": "n (generations a prompt)",
}
"""What an axis says; another name stands for itself."""
REWARDS = ("oracle_accuracy", "accuracy")
"""What the plots call reward: the first of these that was measured."""
CHAINS = ("cot_tokens_mean", "train_rollouts/reasoning_tokens_mean")
"""What the length of chains is plotted by: the first of these that has a course. Some sets are evaluated once."""
PARTS = {
    "oracle_accuracy_verifiable": "where a program can grade the answers",
    "oracle_accuracy_unverifiable": "where no program can grade the answers",
}
"""Of regimes that have both."""


@dataclass(frozen=True, slots=True)
class Plot:
    """`y` of every comparison: over training, along a path through training, or at its end."""

    name: str
    title: str
    comparisons: Sequence[Comparison]
    x: str
    """step or epoch; a metric; the key that an ablation varies."""
    y: str
    kind: Literal["curve", "path", "ablation"] = "curve"


@dataclass(frozen=True, slots=True)
class Line:
    """One arm of a panel, or the arms of an ablation in a row (with an empty label)."""

    label: str
    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]
    seeds: list[tuple[list[float], list[float]]]
    """(x, y) of each."""


def plots_of(results: Sequence[Comparison]) -> list[Plot]:
    """The paper's figures that the results have the metrics for, in its order; an ablation has two."""
    metrics = {metric for comparison in results for arm in comparison.arms.values() for metric in arm}
    reward = next((name for name in REWARDS if name in metrics), REWARDS[-1])
    pace, equal = ("epoch", "at equal epochs") if "epoch" in metrics else ("step", "at equal updates")
    main = [comparison for comparison in results if comparison.ablated is None]
    mixed = [comparison for comparison in main if any(set(PARTS) <= set(arm) for arm in comparison.arms.values())]
    chain = next((name for name in CHAINS if any(_has_course(comparison, name) for comparison in main)), CHAINS[0])
    plots = [
        Plot("reward_against_kl", "Reward against KL", main, "kl", reward, "path"),
        Plot("accuracy", "Held-out accuracy over training", main, "step", reward),
        *(Plot(part, f"Held-out accuracy {what}", mixed, "step", part) for part, what in PARTS.items()),
        Plot("consistent_accuracy", "Both judgements of a pair are right", main, "step", "consistent_accuracy"),
        Plot("one_sided_rate", "One judgement of a pair is right", main, "step", "one_sided_rate"),
        Plot("bound_against_reward", "Bound against reward", main, reward, "bound", "path"),
        Plot("proxy_nll", f"Held-out proxy NLL {equal}", main, pace, "proxy_nll"),
        Plot("chain_of_thought", "Length of the chain of thought", main, "step", chain),
        Plot("chain_gain", "What a chain adds to the answer's log-prob", main, "step", "chain_gain"),
        Plot("verdict_yes_rate", "Own answers that deserve a yes", main, "step", "train_rollouts/verdict_yes_rate"),
        Plot("verdict_accuracy", "Verdicts on own answers", main, "step", "train_rollouts/verdict_accuracy"),
        Plot("votes", "Choosing among samples", [v for one in main for v in votes(one)], "samples", "chosen"),
    ]
    for key in dict.fromkeys(comparison.ablated for comparison in results if comparison.ablated):
        ablation = [comparison for comparison in results if comparison.ablated == key]
        for name, what, metric in (("accuracy", "accuracy", reward), ("proxy_nll", "proxy NLL", "proxy_nll")):
            title = f"{key}: held-out {what} after the last update"
            plots.append(Plot(f"ablation_{key}_{name}", title, ablation, str(key), metric, "ablation"))
    return [plot for plot in plots if any(panel_lines(plot, comparison) for comparison in plot.comparisons)]


def _has_course(comparison: Comparison, metric: str) -> bool:
    """Whether an arm logged it at two steps or more."""
    return any(len(band.steps) > 1 for arm in comparison.arms for band in comparison.bands(arm, metric) or [])


def panel_lines(plot: Plot, comparison: Comparison) -> list[Line]:
    """The lines of one regime, without arms that never logged what the plot shows; none where all are points."""
    if plot.kind == "ablation":
        return _ablation_line(plot, comparison)
    if not _has_course(comparison, plot.y):
        return []
    lines = []
    for arm in comparison.arms:
        found = comparison.bands(arm, *([plot.y] if plot.x == "step" else [plot.x, plot.y]))
        if found:
            y, steps = found[-1], [float(step) for step in found[-1].steps]
            x = steps if plot.x == "step" else found[0].mean
            of_seeds = [steps] * len(y.seeds) if plot.x == "step" else found[0].seeds
            lines.append(Line(arm, x, y.mean, y.low, y.high, list(zip(of_seeds, y.seeds, strict=True))))
    return lines


def _ablation_line(plot: Plot, comparison: Comparison) -> list[Line]:
    """The last values of all arms, side by side in the order of their numbers."""
    found = [bands[0] for _, arm in ablation_arms(plot, comparison) if (bands := comparison.bands(arm, plot.y))]
    if not found:
        return []
    places = [float(index) for index in range(len(found))]
    dots = [([x], [seed[-1]]) for x, band in zip(places, found, strict=True) for seed in band.seeds]
    low, high = [band.low[-1] for band in found], [band.high[-1] for band in found]
    return [Line("", places, [band.mean[-1] for band in found], low, high, dots)]


def ablation_arms(plot: Plot, comparison: Comparison) -> list[tuple[float, str]]:
    """Number and name of the arms that logged the plot's metric, in the order of their numbers."""
    parsed = ((key_and_number(arm), arm) for arm in comparison.arms if comparison.bands(arm, plot.y))
    return sorted((found[1], arm) for found, arm in parsed if found)


def caption(plot: Plot) -> str:
    """What lines, bands and dots are, and how many seeds there were."""
    counts = {len(band.seeds) for c in plot.comparisons for arm in c.arms for band in c.bands(arm, plot.y) or []}
    if counts == {1}:
        return "One seed, so there is no spread to show."
    seeds = " to ".join(str(count) for count in sorted({min(counts), max(counts)})) + " seeds"
    return {
        "curve": f"Line: mean over {seeds}. Band: from the smallest to the largest seed.",
        "path": f"Thick line: mean over {seeds}, from the ring at the first update on. Thin lines: single seeds.",
        "ablation": f"Line: mean over {seeds}. Band: from the smallest to the largest seed. Dots: single seeds.",
    }[plot.kind]
