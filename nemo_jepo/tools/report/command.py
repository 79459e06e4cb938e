"""The command line of `nemo-jepo report`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from nemo_jepo.config.errors import DataError
from nemo_jepo.utils.exit_codes import DONE
from nemo_jepo.utils.files import write_atomically


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nemo-jepo report",
        description="Runs and results of experiments as one HTML page that needs no network: curves, settings that "
        "differ, rollouts token by token, the plots of experiments. Exit code 0: written, 2: an input to change.",
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="a run folder, <exp_dir>/<name>")
    parser.add_argument(
        "--results", type=Path, nargs="+", default=[], metavar="FILE", help="results.parquet of experiments, as plots"
    )
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="default report.html")
    parser.add_argument(
        "--plots", type=Path, metavar="FOLDER", help="write plots (PNG) and tables (tables.md) there as well"
    )
    parser.add_argument(
        "--rollout-steps",
        type=int,
        default=40,
        metavar="N",
        help="show the rollouts of so many steps of a run, evenly spaced, training and validation each; default 40",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """`nemo-jepo report`: write the page.

    Raises:
        DataError: a run or a file of results that cannot be read, or a place where nothing can be written.
    """
    parser = _parser()
    options = parser.parse_args(list(argv))
    if not options.runs and not options.results:
        parser.error("give a RUN, or --results FILE")
    try:
        write(options)
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}. Choose another --out or --plots.") from error
    print(options.out)
    return DONE


def write(options: argparse.Namespace) -> None:
    """Read everything, then write plots and page."""
    from nemo_jepo.tools.report.drawings import draw_all
    from nemo_jepo.tools.report.page import write_page
    from nemo_jepo.tools.report.results import read_all
    from nemo_jepo.tools.report.runs import read_runs
    from nemo_jepo.tools.report.tables import markdown, tables_of

    runs = read_runs(options.runs, options.rollout_steps)
    results = read_all(options.results)
    drawings = draw_all(results) if results else []
    tables = tables_of(results)
    if options.plots and results:
        options.plots.mkdir(parents=True, exist_ok=True)
        files = {f"{drawing.name}.png": drawing.light for drawing in drawings}
        for name, content in (files | {"tables.md": markdown(tables).encode()}).items():
            write_atomically(options.plots / name, content)
    write_page(options.out, runs, drawings, tables)
