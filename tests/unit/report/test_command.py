"""nemo-jepo report, as a user runs it."""

import pytest

from nemo_jepo import cli
from nemo_jepo.tools.report.results import read_results
from nemo_jepo.tools.report.tables import markdown, tables_of
from tests.support.report_folders import write_run
from tests.unit.report.test_drawings import rows, written


def main(*arguments: str) -> int:
    return cli.main(["report", *arguments])


def test_plots_go_into_the_page_and_into_their_folder(tmp_path, capsys):
    one = written(tmp_path / "one.parquet", rows(arms=("jepo",), regimes=("verifiable",)))
    other = written(tmp_path / "other.parquet", rows(("n_1", "n_2"), "n", regimes=("verifiable",)))
    out, folder = tmp_path / "page.html", tmp_path / "plots"
    assert main("--results", str(one), str(other), "--out", str(out), "--plots", str(folder)) == 0
    names = sorted(path.stem for path in folder.glob("*.png"))
    main_figures = ["accuracy", "bound_against_reward", "chain_of_thought", "proxy_nll", "reward_against_kl"]
    assert names == ["ablation_n_accuracy", "ablation_n_proxy_nll", *main_figures]
    assert all(f'id="figure-{name}"' in out.read_text() for name in names)
    assert {path.name for path in folder.iterdir()} == {"tables.md", *(f"{name}.png" for name in names)}
    assert (folder / "tables.md").read_text() == markdown(tables_of([*read_results(one), *read_results(other)]))


def test_without_results_there_are_no_figures_to_write(tmp_path):
    folder = tmp_path / "plots"
    run = write_run(tmp_path / "mine")
    assert main(str(run), "--out", str(tmp_path / "page.html"), "--plots", str(folder)) == 0
    assert not folder.exists()


def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "page.html"
    folder = write_run(tmp_path / "mine")
    (tmp_path / "file").write_text("")
    capsys.readouterr()
    for arguments in (
        [str(tmp_path / "none"), "--out", str(out)],
        [str(folder), str(folder), "--out", str(out)],
        ["--results", str(tmp_path / "none.parquet"), "--out", str(out)],
        [str(folder), "--out", str(tmp_path / "file" / "page.html")],
        [str(folder), "--out", str(folder)],
    ):
        assert main(*arguments) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert not out.exists()


def test_nothing_to_report_on_is_a_usage_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "give a RUN, or --results FILE" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main("--help")
    assert "--rollout-steps" in capsys.readouterr().out
