"""The pages of docs/results say what the results.parquet files hold: every difference, table, arm and seed."""

import re
from collections import Counter
from collections.abc import Collection
from functools import cache
from pathlib import Path
from statistics import fmean

import pyarrow.parquet
import pytest

from nemo_jepo.config.schema import ArithmeticConfig
from nemo_jepo.data.arithmetic import arithmetic_rows
from nemo_jepo.tools.experiments import load_experiment, only, plan_runs
from nemo_jepo.tools.report.results import Comparison, read_all, read_results
from nemo_jepo.tools.report.tables import markdown, tables_of

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {
    "tables.md": "index.md",
    "family/tables.md": "family.md",
    "collapse/tables.md": "collapse.md",
    "dpo/tables.md": "dpo.md",
    "self-verification/tables.md": "self-verification.md",
    "curricula/tables.md": "curricula.md",
    "judge/tables.md": "judge.md",
}
"""Tables -> the page whose command makes them."""
TEXTS = {page: (DOCS / "results" / page).read_text() for page in PAGES.values()}
SETS = sorted(file.parent.name for file in (DOCS / "results").glob("*/results.parquet"))
ACCURACY, VERIFIABLE, UNVERIFIABLE = "oracle_accuracy", "oracle_accuracy_verifiable", "oracle_accuracy_unverifiable"

CLAIMS = [
    ("mini_verifiable", "jepo", "rloo", ACCURACY, "within noise"),
    ("mini_verifiable", "jepo", "jepo_single", ACCURACY, "above"),
    ("mini_verifiable", "sft_chain_of_thought", "jepo", ACCURACY, "above"),
    ("mini_semi", "jepo", "rloo", UNVERIFIABLE, "above"),
    ("mini_semi", "jepo_rl", "rloo", UNVERIFIABLE, "above"),
    ("mini_semi", "jepo", "rloo", VERIFIABLE, "below"),
    ("mini_unverifiable", "jepo", "sft", "proxy_nll", "below"),
    ("mini_unverifiable", "jepo", "jepo_beta_sup_0", "proxy_nll", "below"),
    *(("mini_family_verifiable", arm, "jepo", ACCURACY, "within noise") for arm in ("verifree", "nrt", "gm", "rloo")),
    *(
        ("mini_family_verifiable", arm, "jepo", ACCURACY, "below")
        for arm in ("avg_logprob", "jepo_single", "rlpr", "sft_sampled_chain")
    ),
    ("mini_family_unverifiable", "nrt", "jepo", "proxy_nll", "within noise"),
    *(
        ("mini_family_unverifiable", arm, "jepo", "proxy_nll", "above")
        for arm in ("jepo_single", "avg_logprob", "gm", "verifree", "r3", "rlpr", "vr_cli")
    ),
    ("mini_family_unverifiable", "verifree", "jepo", ACCURACY, "within noise"),
    *(
        ("mini_collapse", arm, other, metric, relation)
        for arm in ("rlpr", "nrt", "vr_cli", "small_answer_term")
        for other in ("jepo", "sft")
        for metric, relation in ((ACCURACY, "above"), ("proxy_nll", "below"))
    ),
    *(("mini_collapse", arm, "jepo", ACCURACY, "above") for arm in ("verifree", "r3", "gm")),
    *(("mini_collapse", arm, "jepo", ACCURACY, "within noise") for arm in ("avg_logprob", "warm_start_jepo")),
    ("mini_collapse", "floor", "jepo", ACCURACY, "below"),
    ("mini_judge", "rloo", "sft", "consistent_accuracy", "above"),
    ("mini_collapse", "floor_small_answer_term", "small_answer_term", ACCURACY, "within noise"),
    ("mini_dpo", "dpo", "rloo", ACCURACY, "within noise"),
    ("mini_dpo", "dpo", "jepo", ACCURACY, "below"),
    ("mini_dpo", "dpo_5", "dpo", ACCURACY, "within noise"),
    ("mini_dpo", "dpo_25", "dpo", ACCURACY, "within noise"),
    ("mini_dpo", "dpo_offline", "dpo", ACCURACY, "below"),
    ("mini_self_verification", "verdict", "rloo", ACCURACY, "within noise"),
    ("mini_self_verification", "verdict", "rloo", "maj_at_16", "above"),
    ("mini_curriculum", "easy_first", "uniform", ACCURACY, "within noise"),
    ("mini_curriculum", "easy_first", "uniform", "proxy_nll", "within noise"),
    ("mini_curriculum", "learning_progress_by_length", "uniform", ACCURACY, "within noise"),
    ("mini_curriculum", "learning_progress_by_length", "uniform", "proxy_nll", "within noise"),
    ("mini_curriculum", "drop_easy", "uniform", ACCURACY, "below"),
    ("mini_curriculum", "drop_easy", "uniform", "proxy_nll", "above"),
    ("mini_curriculum", "learning_progress", "uniform", ACCURACY, "below"),
    ("mini_curriculum", "learning_progress", "uniform", "proxy_nll", "below"),
]


@cache
def comparison_of(name: str) -> Comparison:
    """What a set measured."""
    (comparison,) = read_results(DOCS / "results" / name / "results.parquet")
    return comparison


def last(name: str, arm: str, metric: str) -> dict[int, float]:
    """seed -> value after the last update."""
    return {seed: curve[max(curve)] for seed, curve in comparison_of(name).arms[arm][metric].items()}


def differences(name: str, arm: str, other: str, metric: str) -> list[float]:
    """arm - other, seed by seed: both began with the same weights and saw the same prompts."""
    mine, others = last(name, arm, metric), last(name, other, metric)
    return [mine[seed] - others[seed] for seed in sorted(mine)]


def overlap(one: Collection[float], other: Collection[float]) -> bool:
    """Whether the ranges over seeds have a value in common."""
    return min(one) <= max(other) and min(other) <= max(one)


def shown(values: list[float]) -> str:
    """+0.53 (+0.51 to +0.55): mean, smallest, largest."""
    mean, *ends = (f"{value:+.3f}" for value in (sum(values) / len(values), min(values), max(values)))
    return f"{mean} ({' to '.join(ends)})"


@pytest.mark.parametrize(("name", "arm", "other", "metric", "relation"), CLAIMS)
def test_a_claim_of_the_page_is_what_was_measured(name, arm, other, metric, relation):
    found = differences(name, arm, other, metric)
    measured = f"`{arm}` - `{other}` | {shown(found)} |"
    (row,) = [line for text in TEXTS.values() for line in text.splitlines() if measured in line]
    assert f"`{name}`, " in row
    assert ("within noise" in row) == (relation == "within noise")
    assert {
        "above": min(found) > 0,
        "below": max(found) < 0,
        "within noise": overlap(last(name, arm, metric).values(), last(name, other, metric).values()),
    }[relation]


@pytest.mark.parametrize("arm", ["rlpr", "nrt", "vr_cli"])
def test_objectives_that_count_a_useless_chain_as_none_keep_chains_as_long_as_a_right_one(arm):
    """In every seed of mini_collapse; a right chain of three steps has 17 tokens, the marker 4."""
    marker, right = 4, 17
    lengths = comparison_of("mini_collapse").arms[arm]["cot_tokens_mean"]
    assert len(lengths) == 3 and min(curve[max(curve)] for curve in lengths.values()) >= marker + right
    shortest = min(length - marker for curve in lengths.values() for step, length in curve.items() if step > 0)
    said = re.search(r"never shorter than ([\d.]+) tokens at a validation", TEXTS["collapse.md"])
    assert said is not None and shortest >= float(said[1])


def cell(found: Collection[float], decimals: int = 2) -> str:
    """0.53 (0.51 to 0.55): mean, smallest, largest."""
    mean, *ends = (f"{value:.{decimals}f}" for value in (fmean(found), min(found), max(found)))
    return f"{mean} ({' to '.join(ends)})"


@pytest.mark.parametrize("arm", load_experiment("mini_collapse").arms)
def test_the_page_on_collapse_has_the_means_and_the_spread_of_every_arm(arm):
    def spread(metric: str) -> str:
        return cell(last("mini_collapse", arm, metric).values())

    curves = comparison_of("mini_collapse").arms[arm]["cot_tokens_mean"].values()
    marker, seeds = 4, len(curves)
    tokens = [sum(curve[step or max(curve)] for curve in curves) / seeds - marker for step in (20, None)]
    cells = [f"`{arm}`", spread(ACCURACY), spread("proxy_nll"), *(f"{number:.1f}" for number in tokens)]
    assert f"| {' | '.join(cells)} |" in TEXTS["collapse.md"].splitlines()


@pytest.mark.parametrize("arm", load_experiment("mini_dpo").arms)
def test_the_page_on_dpo_has_the_means_and_the_spread_of_every_arm(arm):
    after_30 = [curve[30] for curve in comparison_of("mini_dpo").arms[arm][ACCURACY].values()]
    ends = [list(last("mini_dpo", arm, metric).values()) for metric in (ACCURACY, "proxy_nll")]
    (row,) = [line for line in TEXTS["dpo.md"].splitlines() if line.startswith(f"| `{arm}` |")]
    assert [text.strip() for text in row.split("|")[3:-1]] == [cell(values, 3) for values in (*ends, after_30)]


def test_the_page_on_dpo_has_the_pairs_that_are_left_and_the_fall_of_an_old_sampler():
    arms, page = comparison_of("mini_dpo").arms, " ".join(TEXTS["dpo.md"].split())

    def late(arm: str, metric: str, num_updates: int) -> list[list[float]]:
        return [[curve[step] for step in sorted(curve)[-num_updates:]] for curve in arms[arm][metric].values()]

    left = {
        arm: [sum(rates) / 10 for rates in late(arm, "train_rollouts/pair_rate", 10)] for arm in ("dpo", "dpo_offline")
    }
    known = [rate for rates in late("dpo_offline", "train_rollouts/pair_accuracy", 20) for rate in rates]
    for values, said in (
        (left["dpo"], "over the last ten updates {} to {} of 100 prompts have a pair"),
        (left["dpo_offline"], "of the first model: {} to {} of 100 have one"),
        (known, "tells {} to {} of 100 apart"),
    ):
        assert said.format(*(f"{100 * value:.0f}" for value in (min(values), max(values)))) in page
    fall = [arms["dpo_25"][ACCURACY][1][step] for step in (40, 50)]
    assert "seed 1 falls from {:.2f} to {:.2f} between updates 40 and 50".format(*fall) in page
    means = [
        sum(last("mini_dpo", arm, ACCURACY).values()) / 3 for arm in ("dpo_offline", "dpo_25", "dpo_5", "dpo", "rloo")
    ]
    assert f"| here | {' | '.join(f'{100 * mean:.1f}' for mean in means)} |" in page


def test_before_their_syncs_differ_two_semi_online_runs_are_one():
    curves = comparison_of("mini_dpo").arms
    for metric in (ACCURACY, "proxy_nll"):
        for seed, curve in curves["dpo_25"][metric].items():
            other = curves["dpo_offline"][metric][seed]
            assert [curve[step] for step in (0, 10, 20)] == [other[step] for step in (0, 10, 20)]
            assert curve[30] != other[30]


VERDICTS = ("verdict", "verdict_free")


@pytest.mark.parametrize("arm", VERDICTS)
@pytest.mark.parametrize("samples", [4, 8, 16])
def test_the_page_on_self_verification_has_what_votes_and_the_best_of_a_few_samples_are_worth(arm, samples):
    votes = [last("mini_self_verification", arm, f"{vote}_at_{samples}") for vote in ("maj", "weighted_maj", "best")]
    cells = [f"`{arm}`", str(samples), *(cell(found.values(), 3) for found in votes)]
    assert f"| {' | '.join(cells)} |" in TEXTS["self-verification.md"].splitlines()


@pytest.mark.parametrize("arm", VERDICTS)
def test_the_page_on_self_verification_has_what_verdicts_say_of_right_and_of_wrong_answers(arm):
    metrics = ("avg_at_16", "verdict_accuracy", "verdict_of_right", "verdict_of_wrong")
    cells = [f"`{arm}`", *(cell(last("mini_self_verification", arm, metric).values()) for metric in metrics)]
    assert f"| {' | '.join(cells)} |" in TEXTS["self-verification.md"].splitlines()


def vote_gains(arm: str, samples: int) -> list[float]:
    """The weighted vote less the majority, seed by seed."""
    plain, weighted = (last("mini_self_verification", arm, f"{vote}_at_{samples}") for vote in ("maj", "weighted_maj"))
    return [weighted[seed] - plain[seed] for seed in sorted(plain)]


def test_in_every_seed_verdicts_of_a_policy_that_is_held_improve_votes_of_few_samples():
    at_4, at_8, at_16 = (vote_gains("verdict", samples) for samples in (4, 8, 16))
    assert min(*at_4, *at_8) > 0.01 and max(map(abs, at_16)) < 0.01
    said = (
        f"at 4 samples {shown(at_4)}, at 8 {shown(at_8)}, at 16 {shown(at_16)}. Without verdicts the majority of 16 is "
    )
    without = last("mini_self_verification", "rloo", "maj_at_16").values()
    assert f"{said}{cell(without, 3)}." in TEXTS["self-verification.md"]
    assert max(abs(gain) for samples in (4, 8, 16) for gain in vote_gains("verdict_free", samples)) < 0.005


@pytest.mark.parametrize("arm", VERDICTS)
def test_in_every_seed_the_best_of_sixteen_is_worse_than_a_sample_and_falls_with_their_number(arm):
    share = last("mini_self_verification", arm, "avg_at_16")
    best = [last("mini_self_verification", arm, f"best_at_{samples}") for samples in (4, 8, 16)]
    assert all(best[2][seed] < share[seed] - 0.1 and best[2][seed] < best[1][seed] < best[0][seed] for seed in share)


def sampled_tokens(name: str, arm: str) -> list[float]:
    """Tokens of a sample, mean over the updates of a run's main part; one number a seed."""
    curves = comparison_of(name).arms[arm]["train_rollouts/response_tokens_mean"].values()
    return [sum(curve.values()) / len(curve) for curve in curves]


@pytest.mark.parametrize("arm", load_experiment("mini_curriculum").arms)
def test_the_page_on_curricula_has_the_means_and_the_spread_of_every_arm(arm):
    curves = comparison_of("mini_curriculum").arms[arm][ACCURACY].values()
    after_16 = "" if arm == "easy_first" else cell([curve[16] for curve in curves], 3)
    ends = (cell(last("mini_curriculum", arm, metric).values(), 3) for metric in (ACCURACY, "proxy_nll"))
    cells = [f"`{arm}`", after_16, *ends, cell(sampled_tokens("mini_curriculum", arm), 1)]
    assert f"| {' | '.join(cells)} |" in TEXTS["curricula.md"].splitlines()


def test_the_page_on_curricula_has_what_its_reasons_rest_on():
    arms, page = comparison_of("mini_curriculum").arms, " ".join(TEXTS["curricula.md"].split())
    start, stage = (fmean([arms[arm][ACCURACY][seed][0] for seed in (1, 2, 3)]) for arm in ("uniform", "easy_first"))
    assert f"from {start:.2f} to {stage:.2f}" in page and f"lift all lengths to {stage:.2f}" in page
    greedy = [curve[step] for step in (0, 32) for curve in arms["uniform"]["accuracy_greedy"].values()]
    assert f"are right in {fmean(greedy[3:]):.2f}, {fmean(greedy[:3]):.2f} before" in page
    left = arms["drop_easy"]["train_rollouts/prompts_left"].values()
    first = [min(step for step, number in curve.items() if number == 32) for curve in left]
    assert f"left after {min(first)} to {max(first)} updates" in page
    drawn = [curve[32] for curve in arms["learning_progress"]["train_rollouts/sampler_effective_prompts"].values()]
    assert f"as if {min(drawn):.0f} to {max(drawn):.0f} of the 128" in page


def test_the_page_on_a_judge_has_the_shares_before_and_after():
    """Both judgements of a pair become right together in every seed, more than by chance of its single ones."""
    metrics = ("consistent_accuracy", "one_sided_rate", "accuracy", "accuracy_greedy", "unread_rate")
    arms = comparison_of("mini_judge").arms

    def row(name: str, arm: str, step: int | None) -> str:
        curves = (arms[arm][metric].values() for metric in metrics)
        cells = [cell([curve[max(curve) if step is None else step] for curve in of_seeds]) for of_seeds in curves]
        return f"| {name} | {' | '.join(cells)} |"

    lines = TEXTS["judge.md"].splitlines()
    assert row("before", "rloo", 0) == row("before", "sft", 0)
    assert {row("before", "rloo", 0), row("`rloo`", "rloo", None), row("`sft`", "sft", None)} <= set(lines)
    for curve in arms["rloo"]["consistent_accuracy"].values():
        assert curve[max(curve)] > 2 * curve[0]


def test_the_single_sample_bound_is_closing_in():
    comparison = comparison_of("mini_verifiable")
    multi, single = (comparison.bands(arm, ACCURACY)[0] for arm in ("jepo", "jepo_single"))
    gap = {step: one - other for step, one, other in zip(multi.steps, multi.mean, single.mean, strict=True)}
    assert gap[20] > gap[40] > gap[60] > 0
    assert (
        f"it was {gap[20]:.2f} behind after 20, {gap[40]:.2f} after 40" in TEXTS["index.md"]
        and f"is {gap[60]:.2f} behind" in TEXTS["index.md"]
    )


def test_every_seed_has_problems_of_its_own_and_a_constant_answer_is_right_as_often_as_the_page_says():
    """The three arithmetic sets that the runs of `mini` were validated on."""
    config = ArithmeticConfig(num_steps=3)
    rows = [row for seed in (1, 2, 3) for row in arithmetic_rows(config, "validation", seed)]
    assert len({row.question for row in rows}) == len(rows) == 3 * 256
    ((answer, count),) = Counter(row.answer for row in rows).most_common(1)
    assert f"always answering {answer}, the most frequent digit, has {count / len(rows):.2f}" in TEXTS["index.md"]
    for name in ("mini_verifiable", "mini_unverifiable"):
        found = last(name, "sft", ACCURACY).values()
        assert abs(sum(found) / len(found) - count / len(rows)) < 0.04


README = {
    "short answers, accuracy": ("mini_verifiable", ACCURACY, ("jepo", "rloo", "sft")),
    "40% of the answers beyond the program: accuracy on those": ("mini_semi", UNVERIFIABLE, ("jepo", "rloo")),
    "answers are derivations, proxy NLL, nats": ("mini_unverifiable", "proxy_nll", ("jepo", "sft")),
}


@pytest.mark.parametrize("line", README)
def test_the_readme_has_the_means(line):
    name, metric, arms = README[line]
    comparison = comparison_of(name)
    bands = [comparison.bands(arm, metric)[0] for arm in arms]
    cells = [f"{value:.2f}" for value in (bands[0].mean[0], *(band.mean[-1] for band in bands))]
    (row,) = [row for row in (DOCS.parent / "README.md").read_text().splitlines() if row.startswith(f"| {line} |")]
    assert [cell.strip() for cell in row.split("|")[2:-1] if cell.strip()] == cells


FAMILY = {"short": ("mini_family_verifiable", ACCURACY), "long": ("mini_family_unverifiable", "proxy_nll")}


def test_the_family_page_has_the_means_of_every_member_that_needs_no_program():
    rows = [line.split("|") for line in TEXTS["family.md"].splitlines() if re.match(r"\| `\w+` \|", line)]
    assert {cells[1].strip("` ") for cells in rows} == set(load_experiment("mini_family_unverifiable").arms)
    for cells in rows:
        for (name, metric), cell in zip(FAMILY.values(), cells[3:5], strict=True):
            found = last(name, cells[1].strip("` "), metric).values()
            assert cell.strip() == f"{sum(found) / len(found):.3f}"


@pytest.mark.parametrize("tables", PAGES)
def test_the_tables_are_those_of_the_results(tables):
    command = re.search(r"--results mini_\{?([\w,]+)\}?/results.parquet", TEXTS[PAGES[tables]])
    assert command
    files = [DOCS / "results" / f"mini_{name}" / "results.parquet" for name in command[1].split(",")]
    assert (DOCS / "results" / tables).read_text() == markdown(tables_of(read_all(files)))


@pytest.mark.parametrize("name", SETS)
def test_results_are_of_every_arm_and_seed_of_the_set_to_its_last_update(name):
    experiment = load_experiment(name)
    rows = pyarrow.parquet.read_table(DOCS / "results" / name / "results.parquet").to_pylist()
    runs = {(row["arm"], row["seed"]) for row in rows}
    assert runs == {(arm, seed) for arm in experiment.arms for seed in experiment.seeds}
    one_seed = plan_runs(name, only(experiment, experiment.seeds[:1], []), [])
    steps = {run.arm: run.config.trainer.jepo.max_steps for run in one_seed}
    assert {(row["arm"], row["seed"]) for row in rows if row["step"] == steps[row["arm"]]} == runs
    assert {row["regime"] for row in rows} == {experiment.regime}


def sets_of(page: str) -> list[str]:
    """What the page's command runs."""
    listed = re.search(r"for set in ([^;]+);", page)
    return listed[1].split() if listed else re.findall(r"^    nemo-jepo experiment mini_(\w+)", page, re.MULTILINE)


def test_every_set_that_was_run_is_in_the_command_and_every_picture_exists():
    assert sorted(f"mini_{name}" for text in TEXTS.values() for name in sets_of(text)) == SETS
    for text in TEXTS.values():
        pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
        assert pictures and all((DOCS / "results" / picture).is_file() for picture in pictures)
