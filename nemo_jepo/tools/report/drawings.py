"""The plots of an experiment's results as PNG, for light and for dark pages. Matplotlib's Figure, no pyplot."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo_jepo.config.errors import DataError
from nemo_jepo.tools.report.plots import LABELS, Line, Plot, ablation_arms, caption, panel_lines, plots_of
from nemo_jepo.tools.report.results import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = {"light": ("#1b1f24", "#57606a", "#d8dee4", "#ffffff"), "dark": ("#e6eaef", "#9ba5b1", "#303841", "#0f1317")}
"""Text, ticks, rules, page."""
PALETTE = {
    "light": ("#0072b2", "#d55e00", "#009e73", "#b5578f", "#a97900", "#7a5fb8", "#1b1f24", "#2f8fc4"),
    "dark": ("#4aa8e8", "#f07f2f", "#2fc795", "#e08fc0", "#e6b422", "#b49cf0", "#e6eaef", "#8fd0f5"),
}
"""After Okabe and Ito: told apart with every common kind of colour vision."""
DASHES = ("-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2)))
DOTS_PER_INCH = 144
PIXELS_PER_INCH = 96
"""Of a web page."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """One plot, twice."""

    name: str
    """Of its file, without .png."""
    title: str
    caption: str
    width: int
    """On a page, in its pixels."""
    light: bytes
    """PNG."""
    dark: bytes


def draw_all(results: Sequence[Comparison]) -> list[Drawing]:
    """Every plot that the results have the metrics for.

    Raises:
        DataError: there is none.
    """
    plots = plots_of(results)
    lines = [*results, *(comparison for plot in plots for comparison in plot.comparisons)]
    arms = dict.fromkeys(arm for comparison in lines if comparison.ablated is None for arm in comparison.arms)
    places = {arm: index for index, arm in enumerate(arms)}
    drawings = []
    for plot in plots:
        light, dark = draw(plot, places, "light"), draw(plot, places, "dark")
        width = round(light.get_figwidth() * PIXELS_PER_INCH)
        drawings.append(Drawing(plot.name, plot.title, caption(plot), width, png(light), png(dark)))
    if not drawings:
        raise DataError(f"the results hold none of {', '.join(LABELS)}. Run an experiment that validates.")
    return drawings


def draw(plot: Plot, places: Mapping[str, int], theme: str) -> "Figure":
    """One plot, a panel a regime. places: arm -> place in the palette."""
    from matplotlib.figure import Figure

    shown = [comparison for comparison in plot.comparisons if panel_lines(plot, comparison)]
    columns = min(len(shown), 3)
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(1.0 + 4.0 * columns, 3.5 * rows), facecolor=INK[theme][3])
    figure.set_layout_engine("constrained", w_pad=0.1)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    for axes, comparison in zip(grid.flat, shown, strict=False):
        _frame(axes, plot, comparison, theme)
        _draw_panel(axes, plot, panel_lines(plot, comparison), places, theme)
        if plot.kind == "ablation":
            numbers = [f"{number:g}" for number, _ in ablation_arms(plot, comparison)]
            axes.set_xticks(range(len(numbers)), numbers)
    return figure


def _frame(axes: "Axes", plot: Plot, comparison: Comparison, theme: str) -> None:
    """Title, axes with their units, grid, and the theme's inks."""
    text, muted, rule, page = INK[theme]
    alone = sum(other.regime == comparison.regime for other in plot.comparisons) == 1
    title = comparison.regime if alone else f"{comparison.regime}, {comparison.experiment}"
    axes.set_title(title, loc="left", color=text, fontsize=11)
    axes.set_xlabel(LABELS.get(plot.x, plot.x), color=text)
    axes.set_ylabel(LABELS[plot.y], color=text)
    axes.set_facecolor(page)
    axes.tick_params(colors=muted, labelsize=9)
    axes.grid(color=rule, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(rule)


def _draw_panel(axes: "Axes", plot: Plot, lines: Sequence[Line], places: Mapping[str, int], theme: str) -> None:
    """Bands or single seeds below, means above, names at the ends of the lines."""
    styles = [_style(places.get(line.label, 0), theme) for line in lines]
    for line, style in zip(lines, styles, strict=True):
        several = len(line.seeds) > 1
        if plot.kind == "path":
            for x, y in line.seeds if several else []:
                axes.plot(x, y, color=style["color"], alpha=0.35, linewidth=0.8, label="_seed")
            axes.plot(line.x[:1], line.y[:1], "o", markerfacecolor="none", color=style["color"], label="_start")
        elif several:
            axes.fill_between(line.x, line.low, line.high, alpha=0.2, linewidth=0, color=style["color"])
        if plot.kind == "ablation":
            dots = [(x, y) for xs, ys in line.seeds for x, y in zip(xs, ys, strict=True)]
            axes.plot(*zip(*dots, strict=True), "o", markersize=4, alpha=0.6, color=style["color"], label="_seed")
        axes.plot(line.x, line.y, linewidth=2, label=line.label or plot.x, **style)
    _name_ends(axes, lines, [style["color"] for style in styles])


def _style(place: int, theme: str) -> dict[str, Any]:
    palette = PALETTE[theme]
    rounds, place_in_palette = divmod(place, len(palette))
    return {"color": palette[place_in_palette], "linestyle": DASHES[(place + rounds) % len(DASHES)]}


def _name_ends(axes: "Axes", lines: Sequence[Line], colors: Sequence[str]) -> None:
    """Every line's name at the right edge, as high as its end or as near as the others leave room."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    axes.set_xlim(axes.get_xlim())
    ends = sorted((line.y[-1], index) for index, line in enumerate(lines) if line.label)
    heights = spread([(y - low) / (high - low) for y, _ in ends], 0.075)
    for height, (y, index) in zip(heights, ends, strict=True):
        axes.annotate(
            lines[index].label,
            (lines[index].x[-1], y),
            xytext=(1.04, height),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=colors[index],
            arrowprops={"arrowstyle": "-", "color": colors[index], "linewidth": 0.6, "alpha": 0.6, "shrinkB": 2},
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved as little as keeps them a gap apart, first upwards, then down from 1."""
    moved = list(heights)
    for index in range(1, len(moved)):
        moved[index] = max(moved[index], moved[index - 1] + gap)
    top = max(1.0, heights[-1] if heights else 1.0)
    for index in reversed(range(len(moved))):
        moved[index] = min(moved[index], top)
        top = moved[index] - gap
    return moved


def png(figure: "Figure") -> bytes:
    """The plot as a PNG file of few colours, a third of the size; the same bytes every time."""
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DOTS_PER_INCH)
    image = Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    image.save(small, format="png", optimize=True)
    return small.getvalue()
