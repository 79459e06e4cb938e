"""Figures from a generated results table, checked line by line against the formula that made it."""

import struct

import numpy
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.collections import PolyCollection

from nemo_jepo.config.errors import DataError
from nemo_jepo.tools.report.drawings import draw, draw_all, spread
from nemo_jepo.tools.report.plots import caption, plots_of
from nemo_jepo.tools.report.results import COLUMNS, key_and_number, read_all, read_results

REGIMES, ARMS, SEEDS, STEPS = ("verifiable", "unverifiable"), ("jepo", "rloo", "sft"), (1, 2, 3), (0, 10, 20, 30)
METRICS = ("accuracy", "proxy_nll", "bound", "kl", "cot_tokens_mean")


def value(regime: str, arm: str, seed: int, step: int, metric: str) -> float:
    """A different number for every row; seeds lie 1 apart, so that the mean is that of seed 2."""
    place = 7 * REGIMES.index(regime) + 3 * (ARMS.index(arm) if arm in ARMS else 0) + 20 * METRICS.index(metric)
    return place + (seed - 2) * (1 + step / 10) + step / 10


def rows(arms=ARMS, experiment="main", metrics=METRICS, regimes=REGIMES):
    keys = [(r, a, s, t, m) for r in regimes for a in arms for s in SEEDS for t in STEPS for m in metrics]
    return [(experiment, r, a, s, t, f"val_rollouts/{m}", value(r, a, s, t, m)) for r, a, s, t, m in keys]


def written(path, table):
    columns = dict(zip(COLUMNS, map(list, zip(*table, strict=True)), strict=True))
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.fixture
def results(tmp_path):
    def read(table):
        return read_results(written(tmp_path / "results.parquet", table))

    return read


def figure(results, name):
    plot = {plot.name: plot for plot in plots_of(results)}[name]
    return plot, draw(plot, {arm: place for place, arm in enumerate(ARMS)}, "light")


def named_lines(axes):
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def test_every_regime_is_a_panel_with_a_line_a_band_and_a_name_for_every_arm(results):
    _, drawn = figure(results(rows()), "accuracy")
    assert [axes.get_title(loc="left") for axes in drawn.axes] == list(REGIMES)
    for regime, axes in zip(REGIMES, drawn.axes, strict=True):
        assert list(named_lines(axes)) == list(ARMS)
        assert sorted(text.get_text() for text in axes.texts) == sorted(ARMS)
        bands = [item for item in axes.collections if isinstance(item, PolyCollection)]
        assert len(bands) == len(ARMS)
        for arm, band in zip(ARMS, bands, strict=True):
            line = named_lines(axes)[arm]
            assert line.get_xdata().tolist() == list(STEPS)
            assert line.get_ydata() == pytest.approx([value(regime, arm, 2, step, "accuracy") for step in STEPS])
            edge = {tuple(point) for point in band.get_paths()[0].vertices}
            ends = [(step, value(regime, arm, seed, step, "accuracy")) for step in STEPS for seed in (1, 3)]
            assert edge == {(float(step), y) for step, y in ends}
        assert axes.get_xlabel() == "updates" and "accuracy" in axes.get_ylabel()


def test_what_chains_add_is_drawn_where_it_was_measured(results):
    assert "chain_gain" not in [plot.name for plot in plots_of(results(rows()))]
    table = [(*row[:5], "val_rollouts/chain_gain", row[6]) for row in rows(metrics=["proxy_nll"])]
    _, drawn = figure(results(table), "chain_gain")
    assert list(named_lines(drawn.axes[0])) == list(ARMS) and "nats" in drawn.axes[0].get_ylabel()


@pytest.mark.parametrize("name", ["verdict_yes_rate", "verdict_accuracy"])
def test_verdicts_are_drawn_over_training_for_the_arms_that_learn_them(results, name):
    table = [(*row[:5], f"train_rollouts/{name}", row[6]) for row in rows(arms=["jepo", "rloo"], metrics=["proxy_nll"])]
    _, drawn = figure(results([*rows(), *table]), name)
    assert list(named_lines(drawn.axes[0])) == ["jepo", "rloo"]
    assert drawn.axes[0].get_ylabel().endswith("in training") and drawn.axes[0].get_xlabel() == "updates"


def test_votes_are_drawn_by_the_number_of_samples_for_the_arms_that_have_verdicts(results):
    """After the last update; an arm with a plain majority alone has no panel."""

    def value_of(vote, samples, seed, step):
        return {"maj": 0.1, "weighted_maj": 0.2, "best": 0.3}[vote] + samples / 100 + seed / 1000 - step

    keys = [
        (v, n, seed, step) for v in ("maj", "weighted_maj", "best") for n in (4, 8) for seed in SEEDS for step in (0, 9)
    ]
    table = [
        ("main", "verifiable", "judged", s, t, f"val_rollouts/{v}_at_{n}", value_of(v, n, s, t)) for v, n, s, t in keys
    ]
    plain = [(*row[:2], "rloo", *row[3:]) for row in table if "/maj_at" in row[5]]
    _, drawn = figure(results([*table, *plain]), "votes")
    (axes,) = drawn.axes
    assert axes.get_title(loc="left") == "verifiable: judged" and axes.get_xlabel() == "samples a problem"
    lines = named_lines(axes)
    for vote, name in (("maj", "majority"), ("weighted_maj", "weighted vote"), ("best", "best of them")):
        assert list(lines[name].get_xdata()) == [4, 8]
        assert list(lines[name].get_ydata()) == pytest.approx([value_of(vote, n, 2, 9) for n in (4, 8)])


def test_a_set_that_is_evaluated_once_shows_its_chains_in_training(results):
    """A line needs two points: such a set has none over held-out problems."""
    training = [
        ("main", regime, arm, seed, step, "train_rollouts/reasoning_tokens_mean", value(regime, arm, seed, step, "kl"))
        for (_, regime, arm, seed, step, name, _) in rows(metrics=["kl"])
    ]
    once = [row for row in rows() if row[4] == STEPS[-1]] + training
    assert [plot.name for plot in plots_of(results(once))] == ["chain_of_thought"]
    _, drawn = figure(results(once), "chain_of_thought")
    assert "in training" in drawn.axes[0].get_ylabel()
    line = named_lines(drawn.axes[0])["jepo"]
    assert line.get_ydata() == pytest.approx([value("verifiable", "jepo", 2, step, "kl") for step in STEPS])
    _, both = figure(results(rows() + training), "chain_of_thought")
    assert both.axes[0].get_ylabel() == "chain of thought (tokens)"


@pytest.mark.parametrize(
    ("name", "x", "y"), [("reward_against_kl", "kl", "accuracy"), ("bound_against_reward", "accuracy", "bound")]
)
def test_a_path_pairs_the_means_of_two_metrics_and_shows_single_seeds(results, name, x, y):
    plot, drawn = figure(results(rows()), name)
    axes = drawn.axes[0]
    for arm in ARMS:
        line = named_lines(axes)[arm]
        assert line.get_xdata() == pytest.approx([value("verifiable", arm, 2, step, x) for step in STEPS])
        assert line.get_ydata() == pytest.approx([value("verifiable", arm, 2, step, y) for step in STEPS])
    assert sum(line.get_label() == "_seed" for line in axes.lines) == len(ARMS) * len(SEEDS)
    assert "nats" in (axes.get_xlabel() if x == "kl" else axes.get_ylabel())
    assert "Thin lines: single seeds" in caption(plot) and "3 seeds" in caption(plot)


def test_an_ablation_has_its_last_values_in_the_order_of_its_numbers(results):
    arms = ("n_8", "n_1", "n_2")
    found = results(rows(arms, "n", regimes=REGIMES[:1]))
    assert found[0].ablated == "n"
    plot, drawn = figure(found, "ablation_n_proxy_nll")
    (axes,) = drawn.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "8"]
    (line,) = named_lines(axes).values()
    assert line.get_ydata() == pytest.approx([value("verifiable", arm, 2, 30, "proxy_nll") for arm in arms])
    (dots,) = [line for line in axes.lines if line.get_label() == "_seed"]
    assert len(dots.get_xdata()) == 9 and axes.get_xlabel() == "n (generations a prompt)"
    assert "after the last update" in plot.title and "Dots: single seeds" in caption(plot)


def test_regimes_come_in_the_order_of_the_paper(tmp_path):
    regimes = ("other", "unverifiable", "semi-verifiable", "verifiable")
    files = [
        written(tmp_path / f"{number}.parquet", [(*row[:1], regime, *row[2:]) for row in rows(regimes=REGIMES[:1])])
        for number, regime in enumerate(regimes)
    ]
    assert [found.regime for found in read_all(files)] == ["verifiable", "semi-verifiable", "unverifiable", "other"]


def test_both_parts_of_mixed_answers_have_a_figure_and_regimes_of_one_kind_none(results):
    parts = ("oracle_accuracy", "oracle_accuracy_verifiable", "oracle_accuracy_unverifiable")
    mixed = [(*row[:5], f"val_rollouts/{part}", row[6]) for row in rows(("jepo",), "mixed") for part in parts]
    alone = [(*row[:5], "val_rollouts/oracle_accuracy_unverifiable", row[6]) for row in rows(("jepo",), "alone")]
    for part in parts[1:]:
        plot, _ = figure(results(mixed + alone), part)
        assert {comparison.experiment for comparison in plot.comparisons} == {"mixed"}
        assert ("no program" in plot.title) == (part == parts[2])
    assert not {plot.name for plot in plots_of(results(alone))} & set(parts)


def test_judgements_of_pairs_have_figures_of_their_own(results):
    names = {"consistent_accuracy", "one_sided_rate"}
    judged = [(*row[:5], f"val_rollouts/{name}", row[6]) for row in rows(("rloo",)) for name in sorted(names)]
    assert {plot.name for plot in plots_of(results(judged))} == names
    assert not names & {plot.name for plot in plots_of(results(rows()))}


def test_ablations_stay_out_of_the_main_figures(results):
    found = results(rows() + rows(("beta_sup_0", "beta_sup_0.01"), "beta_sup"))
    _, drawn = figure(found, "proxy_nll")
    assert [list(named_lines(axes)) for axes in drawn.axes] == [list(ARMS)] * 2
    assert {"ablation_beta_sup_accuracy", "ablation_beta_sup_proxy_nll"} <= {
        drawing.name for drawing in draw_all(found)
    }


def test_proxy_nll_is_over_epochs_where_they_are_known(results):
    epochs = [
        ("main", "verifiable", arm, s, t, "epoch", t / 10 * (1 + (arm == "sft")))
        for arm in ARMS
        for s in SEEDS
        for t in STEPS
    ]
    _, drawn = figure(results(rows(regimes=REGIMES[:1]) + epochs), "proxy_nll")
    (axes,) = drawn.axes
    assert axes.get_xlabel() == "epochs" and len(axes.collections) == len(ARMS)
    assert named_lines(axes)["sft"].get_xdata() == pytest.approx([0, 2, 4, 6])


def test_means_are_over_steps_that_every_seed_has_and_values_that_are_numbers(results):
    table = [row for row in rows() if not (row[3] == 3 and row[4] == 30)]
    table = [(*row[:6], float("nan") if row[3] == 1 and row[4] == 10 else row[6]) for row in table]
    _, drawn = figure(results(table), "chain_of_thought")
    assert named_lines(drawn.axes[0])["jepo"].get_xdata().tolist() == [0, 20]


def test_one_seed_has_no_band_and_says_so(results):
    plot, drawn = figure(results([row for row in rows() if row[3] == 2]), "accuracy")
    assert not drawn.axes[0].collections and caption(plot) == "One seed, so there is no spread to show."


def test_the_oracle_is_the_reward_where_there_is_one(results):
    oracle = [(*row[:5], "val_rollouts/oracle_accuracy", 0.5) for row in rows(metrics=("accuracy",))]
    _, drawn = figure(results(rows() + oracle), "accuracy")
    assert drawn.axes[0].get_ylabel() == "held-out accuracy (oracle)"
    assert set(named_lines(drawn.axes[0])["jepo"].get_ydata()) == {0.5}


def test_drawings_are_light_and_dark_pngs_of_one_size_that_differ(results):
    drawings = draw_all(results(rows(regimes=REGIMES[:1], arms=ARMS[:2])))
    assert [drawing.name for drawing in drawings] == [plot.name for plot in plots_of(results(rows()))]
    for drawing in drawings:
        sizes = [struct.unpack(">II", data[16:24]) for data in (drawing.light, drawing.dark)]
        assert drawing.light[:8] == drawing.dark[:8] == b"\x89PNG\r\n\x1a\n"
        assert sizes[0] == sizes[1] and min(sizes[0]) > 300 and drawing.light != drawing.dark


def test_arms_are_told_apart_by_colour_and_by_dashes(results):
    _, drawn = figure(results(rows()), "accuracy")
    lines = list(named_lines(drawn.axes[0]).values())
    assert len({line.get_color() for line in lines}) == len(ARMS)
    assert [line.is_dashed() for line in lines] == [False, True, True]


def test_as_many_arms_as_the_likelihood_family_has_look_all_different(results):
    arms = "abcdefghijklmnop"
    plot = plots_of(results(rows(arms=arms, regimes=REGIMES[:1])))[0]
    drawn = draw(plot, {arm: place for place, arm in enumerate(arms)}, "light")
    lines = named_lines(drawn.axes[0]).values()
    assert len({(line.get_color(), str(line._unscaled_dash_pattern)) for line in lines}) == len(arms)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=10))
def test_names_keep_their_order_and_their_distance(heights):
    moved = spread(sorted(heights), 0.075)
    assert moved == sorted(moved) and max(moved) <= 1
    assert numpy.diff(moved) == pytest.approx(numpy.maximum(numpy.diff(moved), 0.075))


@pytest.mark.parametrize(
    ("arm", "parsed"),
    [
        ("n_4", ("n", 4.0)),
        ("beta_sup_0.01", ("beta_sup", 0.01)),
        ("kl.beta=1e-3", ("kl.beta", 0.001)),
        ("jepo", None),
        ("jepo_single", None),
        ("a=b", None),
        ("n=1.2.3", None),
        ("n4", None),
    ],
)
def test_an_ablations_arm_is_a_key_and_a_number(arm, parsed):
    assert key_and_number(arm) == parsed


def test_bad_results_are_one_line(tmp_path, results):
    def complaint(path):
        with pytest.raises(DataError) as raised:
            draw_all(read_results(path))
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "no such file" in complaint(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("step,value\n")
    assert "no Parquet" in complaint(tmp_path / "text.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"step": [1]}), tmp_path / "few.parquet")
    assert "no column experiment, regime, arm" in complaint(tmp_path / "few.parquet")
    wrong = written(tmp_path / "type.parquet", [("e", "r", "a", 1, 1, "accuracy", "high")])
    assert "another type" in complaint(wrong)
    unknown = written(tmp_path / "metric.parquet", [("e", "r", "a", 1, 1, "speed", 1.0)])
    assert "hold none of" in complaint(unknown)
