"""nemo-jepo experiment NAME [--seeds 1,2] [--arms jepo,rloo] [--commands] [key=value ...]

A named set of runs, one after another, and what they measured in one table. NAME is a file of conf/experiment, or the
path of one of your own; key=value goes to every run. Run it again to go on where it stopped.

    --seeds      these alone
    --arms       these alone
    --commands   print the command of every run and end, for machines where something else starts them

Every (arm, seed) is a `nemo-jepo train` process of its own. Where the config has a warm-up, that of a seed is trained
once and every arm starts from its weights. What another set has run with the same settings is not run again.

    <exp_dir>/warmup/<config>_seed_1/    also serves other sets over the same config
    <exp_dir>/<NAME>/<arm>/seed_1/       a run folder, with the run's output in train.log; or a link to such a folder
    <exp_dir>/<NAME>/results.parquet     experiment, regime, arm, seed, step, metric, value; of all finished runs

Exit code 0 done, 75 interrupted and saved, 2 a setting to change, 1 a run that failed.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nemo_jepo.config import compose
from nemo_jepo.config.check import check
from nemo_jepo.config.conf_files import conf_dir
from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.reading import library, read_json
from nemo_jepo.config.schema import Config
from nemo_jepo.utils.exit_codes import BAD_SETTINGS, DONE, FAILED, INTERRUPTED
from nemo_jepo.utils.files import write_atomically
from nemo_jepo.utils.processes import die_with_parent

EXP_DIR, WARMUP = "exp_manager.exp_dir", "warmup"
FINISHED, SETTINGS = "finished.json", "settings.json"
"""What a run folder holds beside the run's own files."""
ABOUT_THE_MACHINE = ("timers/", "throughput/", "memory/")
"""Metrics that are left out of results.parquet."""


@dataclass(kw_only=True, slots=True)
class Experiment:
    """A file of conf/experiment."""

    config: str = MISSING
    """The file of conf/ that every run begins with."""
    regime: str = MISSING
    """verifiable, semi-verifiable or unverifiable: what the data is like."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Of data, weights and sampling."""
    overrides: list[str] = field(default_factory=list)
    """Of every run, warm-ups included."""
    arms: dict[str, list[str]] = MISSING
    """What is compared: a name and the overrides that make it."""


@dataclass(frozen=True, slots=True)
class Run:
    """One `nemo-jepo train` process."""

    arm: str
    seed: int
    folder: Path
    config: Config
    """As far as it is known before the warm-up."""
    config_name: str
    overrides: tuple[str, ...]
    start: tuple[str, ...] = ()
    """Overrides that make it begin where the warm-up ends."""

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.seed}"

    @property
    def log(self) -> Path:
        """What the process prints."""
        return self.folder / "train.log"

    @property
    def seconds(self) -> float | None:
        """How long the run took since it was last started; None where it is not finished."""
        note = self.folder / FINISHED
        return read_json(EXP_DIR, note).get("seconds") if note.exists() else None

    def command(self) -> list[str]:
        """The command line; several trainers are started by torchrun."""
        python, devices = [sys.executable], self.config.trainer.devices
        if devices > 1:
            python += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"]
        options = ["--config-name", self.config_name, *self.overrides, *self.start]
        return [*python, "-m", "nemo_jepo.cli", "train", *options]

    def settings(self) -> dict[str, Any]:
        """dotted key -> value, of all that the run's metrics follow from: of everything but its name and place."""
        tree = json.loads(json.dumps(OmegaConf.to_container(OmegaConf.structured(self.config))))
        del tree["exp_manager"]
        return dict(compose.flatten(tree))

    def require_same_settings(self) -> None:
        """Raise ConfigError if the folder is of a run with other settings."""
        held, wanted = _read_settings(self.folder), self.settings()
        if held is not None and held != wanted:
            others = sorted(key for key in held | wanted if held.get(key) != wanted.get(key))
            rule = f"{self.folder} was started with other settings ({', '.join(others)})"
            raise ConfigError(EXP_DIR, self.config.exp_manager.exp_dir, rule, "Choose another folder")

    def begin(self) -> Path | None:
        """Make the folder, as a link to that of a finished run with the same settings if another set has one.

        Returns:
            That folder.
        """
        twin = None if self.folder.exists() else self._twin()
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        if self.folder.is_symlink():
            self.folder.unlink()  # leads nowhere: the other set was removed
        if twin:
            self.folder.symlink_to(os.path.relpath(twin, self.folder.parent))
        elif not (self.folder / SETTINGS).exists():
            self.folder.mkdir(exist_ok=True)
            write_atomically(self.folder / SETTINGS, json.dumps(self.settings()))
        return twin

    def _twin(self) -> Path | None:
        here, wanted = Path(self.config.exp_manager.exp_dir), self.settings()
        finished = sorted(note.parent for note in here.glob(f"*/*/seed_{self.seed}/{FINISHED}"))
        return next((it for it in finished if not it.is_symlink() and _read_settings(it) == wanted), None)


def _read_settings(folder: Path) -> dict[str, Any] | None:
    note = folder / SETTINGS
    return read_json(EXP_DIR, note) if note.exists() else None


# ---- what to run ----------------------------------------------------------------------------------------------


def names() -> list[str]:
    """The sets of conf/experiment."""
    return sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))


def load_experiment(name: str) -> Experiment:
    """The set of that name, or of that file.

    Raises:
        ConfigError: no such set, or a file that does not describe one.
    """
    path = Path(name) if name.endswith(".yaml") else conf_dir() / "experiment" / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError("experiment", name, "no such set or file", f"Choose one of {', '.join(names())}")
    fix = "A set has config, regime, seeds, overrides, arms"
    with library("experiment", str(path), "cannot be read", fix):
        try:
            experiment = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Experiment), OmegaConf.load(path)))
        except (OmegaConfBaseException, YAMLError) as error:
            raise ConfigError("experiment", str(path), " ".join(str(error).split("\n")[0].split()), fix) from error
    assert isinstance(experiment, Experiment)
    if WARMUP in experiment.arms:
        raise ConfigError("experiment", str(path), f"an arm is called {WARMUP}", "Give it another name")
    return experiment


def only(experiment: Experiment, seeds: Sequence[int], arms: Sequence[str]) -> Experiment:
    """The set with these seeds and arms alone; none given, with all.

    Raises:
        ConfigError: it has no such arm.
    """
    for arm in arms:
        if arm not in experiment.arms:
            raise ConfigError("--arms", arm, "no such arm", f"Choose among {', '.join(experiment.arms)}")
    chosen = {arm: overrides for arm, overrides in experiment.arms.items() if not arms or arm in arms}
    return replace(experiment, seeds=list(seeds) or experiment.seeds, arms=chosen)


def plan_runs(name: str, experiment: Experiment, overrides: Sequence[str]) -> list[Run]:
    """Every run in order, seed by seed, a seed's warm-up first.

    Args:
        name: of the set's folder.
        overrides: of every run, after the set's own.
    Raises:
        ConfigError: a setting of any run is wrong, or it needs several nodes.
    """
    return [run for seed in experiment.seeds for run in _runs_of_seed(name, experiment, overrides, seed)]


def _runs_of_seed(name: str, experiment: Experiment, overrides: Sequence[str], seed: int) -> Iterator[Run]:
    seeds = [f"data.seed={seed}", f"model.seed={seed}"]
    make_run = partial(_make_run, experiment.config, seed)
    common = [*experiment.overrides, *overrides]
    start: list[str] = []
    settings = compose.resolve(compose.compose(experiment.config, common))
    if steps := settings.warmup.max_steps:
        folder = f"{WARMUP}/{experiment.config}_seed_{seed}"
        alone = ["trainer.jepo.max_steps=0", *(["stages=[]"] if settings.stages else [])]
        warmup = make_run(WARMUP, folder, [*common, *seeds, *alone])
        yield warmup
        checkpoint = warmup.folder / "warmup" / "checkpoints" / f"step_{steps:06d}"
        path = f"pretrained_checkpoint.restore_from_path={json.dumps(str(checkpoint))}"
        start = [path, "model.hf_config=null", "model.hf_config_path=null", "warmup.max_steps=0"]
    for arm, own in experiment.arms.items():
        second = [override for override in own if override.startswith("warmup.")]  # from the set's own on
        yield make_run(
            arm, f"{name}/{arm}/seed_{seed}", [*experiment.overrides, *own, *overrides, *seeds], start + second
        )


def _make_run(
    config_name: str, seed: int, arm: str, folder: str, overrides: list[str], start: Sequence[str] = ()
) -> Run:
    """The run, checked as `nemo-jepo train` would, but for the checkpoint that it starts from."""
    overrides = [*overrides, f"exp_manager.name={folder}"]
    config = compose.resolve(compose.compose(config_name, overrides))
    if config.trainer.num_nodes > 1:
        rule = "the runs of a set are started one at a time on one node"
        raise ConfigError("trainer.num_nodes", config.trainer.num_nodes, rule, "Start those of --commands by slurm/")
    check(config, config.trainer.devices)
    path = Path(config.exp_manager.exp_dir) / folder
    return Run(arm, seed, path, config, config_name, tuple(overrides), tuple(start))


# ---- running --------------------------------------------------------------------------------------------------


def run_all(runs: Sequence[Run]) -> int:
    """Train what is not finished; the exit code of the first run that does not end well, else 0."""
    for run in runs:
        run.require_same_settings()
    for number, run in enumerate(runs, start=1):
        if run.seconds is not None:
            continue
        if twin := run.begin():
            _say(f"[{number}/{len(runs)}] {run}: the settings are those of {twin}, and so are the metrics")
            continue
        _say(f"[{number}/{len(runs)}] {run}{_time_left(runs)}")
        began = time.monotonic()
        code = _train(run)
        if code == INTERRUPTED:
            _say("interrupted and saved; the same command goes on from here")
        elif code:
            tail = run.log.read_text(errors="replace").strip().splitlines()[-3:]
            _say("\n".join([f"{run} ended with exit code {code} (all of it in {run.log}):", *tail]))
        if code:
            return code
        write_atomically(run.folder / FINISHED, json.dumps({"seconds": round(time.monotonic() - began, 1)}))
    return 0


def _train(run: Run) -> int:
    """The exit code of the run's process. Signals that ask this process to end are passed on to it."""
    asked: list[int] = []
    environment = {"OMP_NUM_THREADS": "1"} | os.environ  # small models are slower with more (docs/log.md)
    with open(run.log, "ab") as log:
        process = subprocess.Popen(
            run.command(),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # or Ctrl-C would reach it twice
            preexec_fn=partial(die_with_parent, signal.SIGTERM),
        )

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        return INTERRUPTED
    return FAILED if code < 0 else code  # negative: killed


def _time_left(runs: Sequence[Run]) -> str:
    """What the unfinished runs will take, each as long as its arm's finished ones or else as a mean run."""
    took = {(run.arm, run.seed): run.seconds for run in runs}
    known = [(arm, seconds) for (arm, _), seconds in took.items() if seconds is not None]
    if not known:
        return ""

    def expected(arm: str) -> float:
        alike = [seconds for other, seconds in known if other == arm] or [seconds for _, seconds in known]
        return sum(alike) / len(alike)

    left = sum(expected(arm) for (arm, _), seconds in took.items() if seconds is None)
    return f"  (about {left / 60:.0f} min left)"


# ---- results --------------------------------------------------------------------------------------------------


def write_results(path: Path, name: str, regime: str, runs: Sequence[Run]) -> int:
    """Every metric of every finished run, one row each; the file is whole or not there.

    Returns:
        Number of rows.
    """
    import pyarrow
    import pyarrow.parquet

    text = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
    types = {"experiment": text, "regime": text, "arm": text, "seed": pyarrow.int64(), "step": pyarrow.int64()}
    schema = pyarrow.schema(types | {"metric": text, "value": pyarrow.float64()})
    rows = [
        {"experiment": name, "regime": regime, "arm": run.arm, "seed": run.seed} | row
        for run in runs
        if run.arm != WARMUP and run.seconds is not None
        for row in _metrics(run.folder / "metrics.jsonl")
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    written = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), written, compression="zstd")
    write_atomically(path, written.getvalue().to_pybytes())
    return len(rows)


def _metrics(file: Path) -> Iterator[dict[str, object]]:
    for line in file.read_text().splitlines():
        metrics = json.loads(line)
        step = metrics.pop("step")
        for metric, value in metrics.items():
            if not metric.startswith(ABOUT_THE_MACHINE):
                yield {"step": step, "metric": metric, "value": value}


# ---- the command ----------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """`nemo-jepo experiment`.

    Raises:
        ConfigError: a setting to change.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(f"{__doc__}\nSets: {', '.join(names())}", file=sys.stdout if argv else sys.stderr)
        return DONE if argv else BAD_SETTINGS
    parser = argparse.ArgumentParser(prog="nemo-jepo experiment", add_help=False)
    parser.add_argument("name")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[])
    parser.add_argument("--arms", type=lambda text: text.split(","), default=[])
    parser.add_argument("--commands", action="store_true")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args(argv)
    name, whole = Path(arguments.name).stem, load_experiment(arguments.name)
    chosen = plan_runs(name, only(whole, arguments.seeds, arguments.arms), arguments.overrides)
    if arguments.commands:
        print("\n".join(shlex.join(run.command()) for run in chosen))
        return DONE
    code = run_all(chosen)
    if code:
        return code
    seeds = sorted({*whole.seeds, *arguments.seeds})
    every = plan_runs(name, replace(whole, seeds=seeds), arguments.overrides)
    path = Path(every[0].config.exp_manager.exp_dir) / name / "results.parquet"
    _say(f"{path}: {write_results(path, name, whole.regime, every)} rows")
    return DONE


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
