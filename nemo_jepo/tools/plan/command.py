"""The command line of `nemo-jepo plan`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_jepo.config import compose
from nemo_jepo.config.schema import Config
from nemo_jepo.config.sources import with_folders
from nemo_jepo.tools.plan import report
from nemo_jepo.tools.plan.estimate import Plan, cluster_of, estimate
from nemo_jepo.tools.plan.hardware import GPUS, gpu_named
from nemo_jepo.tools.plan.search import best_plan, what_to_try
from nemo_jepo.tools.plan.workload import MeanLengths
from nemo_jepo.utils.exit_codes import DONE, FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nemo-jepo plan",
        description="Memory, time and cost of a run by a model, before a GPU is touched. Exit code 0: it fits, 1: it "
        "does not, 2: a setting to change. docs/reference/planner.md has the formulas and how far they were off.",
    )
    parser.add_argument("--config-name", default=compose.DEFAULT_CONFIG, metavar="NAME")
    parser.add_argument("--config-path", metavar="DIR", help="folder of NAME.yaml; default conf/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for nemo-jepo train")
    parser.add_argument("--gpu", default="h100", metavar="KIND", help=", ".join(GPUS))
    parser.add_argument("--nodes", type=_positive, metavar="N", help="nodes in all; default: those of the config")
    parser.add_argument("--gpus-per-node", type=_positive, default=8, metavar="N")
    parser.add_argument(
        "--rollout-nodes",
        type=int,
        default=0,
        metavar="N",
        help="nodes that only sample (rollout.servers); 0: servers beside the trainer (rollout.servers=auto)",
    )
    parser.add_argument("--search", action="store_true", help="find the layout and the split with the shortest step")
    for name in ("prompt", "generated", "answer"):
        text = f"mean {name} tokens; default: half of the longest"
        parser.add_argument(f"--{name}-tokens", type=float, metavar="N", help=text)
    parser.add_argument("--price-per-gpu-hour", type=float, metavar="X", help="in dollars")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def _config(options: argparse.Namespace) -> Config:
    path = Path(options.config_path) if options.config_path else None
    return with_folders(compose.resolve(compose.compose(options.config_name, options.overrides, path)))


def _plan(config: Config, options: argparse.Namespace, means: MeanLengths) -> Plan:
    """The plan as the settings have it, or the best one.

    Raises:
        ConfigError: a rule is broken, or nothing that was searched fits.
    """
    gpu, per_node = gpu_named(options.gpu), options.gpus_per_node
    cluster = cluster_of(config, gpu, per_node, options.nodes, options.rollout_nodes)
    nodes = cluster.trainer_nodes + cluster.rollout_nodes
    if options.search:
        best = best_plan(config, gpu, per_node, nodes, means)
        if best is not None and not best.fits:
            print(f"No layout that was searched fits on --nodes {nodes}. The nearest:", file=sys.stderr)
        if best is not None:
            return best
    return estimate(config, cluster, means)


def _last_resort(searched: bool) -> str:
    return "more nodes or a GPU with more memory" + ("" if searched else ", or --search")


def main(argv: Sequence[str]) -> int:
    """`nemo-jepo plan`: print the plan; 0 where it fits, 1 where not.

    Raises:
        ConfigError: a rule is broken, or nothing that was searched fits.
    """
    options = _parser().parse_intermixed_args(list(argv))
    means = MeanLengths(options.prompt_tokens, options.generated_tokens, options.answer_tokens)
    plan = _plan(_config(options), options, means)
    fix = None if plan.fits else what_to_try(plan, means) or _last_resort(options.search)
    if options.json:
        print(json.dumps(report.as_json(plan, options.price_per_gpu_hour, fix), indent=2))
    else:
        print(report.as_text(plan, options.price_per_gpu_hour, fix))
    return DONE if plan.fits else FAILED
