"""What a run writes for people: metrics, sampled rollouts, loggers, one line or a progress bar a step.

    <run>/config.yaml  metrics.jsonl  rollouts/step_000012.jsonl  events.out.tfevents.*
    <run>/nemo/        cmd-args.log  git-info.log: how the run was started; with W&B what NeMo keeps there

Rank 0 holds a Tracker, every other rank a SilentTracker with the same methods. Metric names start with
train_rollouts/, train_optim/, val_rollouts/, timers/ (seconds) or memory/ (GiB).
"""

import json
import logging
import math
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

import psutil
from tqdm import tqdm

from nemo_jepo.collapse import ChainWatch
from nemo_jepo.config.schema import ExpManagerConfig
from nemo_jepo.utils import phases
from nemo_jepo.utils.files import write_atomically

CONSOLE = {
    "train_optim/surrogate_loss": "surrogate loss",
    "train_rollouts/bound": "bound",
    "train_rollouts/marker_rate": "marker",
    "train_rollouts/cot_tokens_mean": "cot",
    "train_rollouts/kl": "kl",
    "train_optim/grad_norm": "grad",
    "val_rollouts/accuracy": "val accuracy",
    "val_rollouts/proxy_nll": "val nll",
    "timers/step_time": "seconds",
}
"""The metrics that the console shows, in this order and under these names; all others are in metrics.jsonl."""


class SilentTracker:
    """Times phases and writes nothing: the tracker of every rank but 0."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._tokens: dict[str, int] = {}
        self._said: dict[str, str] = {}

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Adds the seconds spent inside to `timers/name` of the next `log`; to a watcher it is a phase of the run."""
        start = time.perf_counter()
        try:
            with phases.phase(name):
                yield
        finally:
            key = f"timers/{name}"
            self._seconds[key] = self._seconds.get(key, 0.0) + time.perf_counter() - start

    def count_tokens(self, phases: Mapping[str, int]) -> None:
        """Tokens of each phase, all ranks together: `throughput/phase_tokens_per_second` of the next `log`."""
        self._tokens = dict(phases)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Records the metrics of one step, with timers, throughput and memory, and starts these anew. Once a step."""
        self._seconds.clear()
        self._tokens = {}

    def log_rollouts(self, step: int, rows: Sequence[Mapping[str, Any]], name: str = "step") -> None:
        """Writes samples of one step to rollouts/name_*.jsonl, one JSON object each (plain Python values)."""

    def save_config(self, text: str) -> None:
        """Writes the resolved configuration to config.yaml."""

    def rewind(self, step: int) -> None:
        """Drops whatever was recorded after `step`; -1 drops all. Call it once, before the first `log`."""

    def say(self, message: str) -> None:
        """Shows one line to whoever watches the run."""

    def say_once(self, about: str, message: str) -> None:
        """The same, unless the last message about this said so already."""
        if self._said.get(about) != message:
            self._said[about] = message
            self.say(message)

    def close(self) -> None:
        """Ends bar and loggers."""
        phases.leave_training()

    def __enter__(self) -> "SilentTracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Tracker(SilentTracker):
    """Writes into the run folder, to the loggers and to stderr.

    Args:
        run_folder: made if missing.
        settings: which loggers.
        max_steps: length of the progress bar.
        num_samples: of one step.
        first_step: where a resumed run goes on; TensorBoard drops what an earlier start wrote from there on.
    """

    def __init__(
        self, run_folder: Path, settings: ExpManagerConfig, max_steps: int, num_samples: int, first_step: int = 0
    ) -> None:
        super().__init__()
        run_folder.mkdir(parents=True, exist_ok=True)
        self._folder = run_folder
        self._settings = settings
        self._max_steps = max_steps
        self._chains = ChainWatch(num_samples)
        self._loggers = list(_loggers(run_folder, settings, first_step))
        self._bar = tqdm(total=max_steps, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None
        self.say(f"run folder {run_folder}, {max_steps} steps")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See SilentTracker; a value that is not finite becomes null in metrics.jsonl."""
        memory = {"memory/host_rss_gib": psutil.Process().memory_info().rss / 2**30}
        throughput = {
            f"throughput/{phase.removesuffix('_time')}_tokens_per_second": tokens / self._seconds[f"timers/{phase}"]
            for phase, tokens in self._tokens.items()
            if self._seconds.get(f"timers/{phase}", 0.0) > 0
        }
        everything = {k: float(v) for k, v in (dict(metrics) | self._seconds | throughput | memory).items()}
        super().log(metrics, step)
        with open(self._folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(_json_line({"step": step} | everything))
        for logger in self._loggers:
            logger.log_metrics(everything, step=step)
        self._show(everything, step)
        for warning in self._chains.see(step, everything):
            self.say(warning)

    def log_rollouts(self, step: int, rows: Sequence[Mapping[str, Any]], name: str = "step") -> None:
        """See SilentTracker."""
        (self._folder / "rollouts").mkdir(exist_ok=True)
        write_atomically(self._folder / "rollouts" / f"{name}_{step:06d}.jsonl", "".join(map(_json_line, rows)))

    def save_config(self, text: str) -> None:
        """See SilentTracker."""
        write_atomically(self._folder / "config.yaml", text)

    def rewind(self, step: int) -> None:
        """See SilentTracker. A line that a killed run left half-written goes too."""
        metrics = self._folder / "metrics.jsonl"
        if metrics.exists():
            lines = metrics.read_text(encoding="utf-8", errors="replace").split("\n")
            kept = [line for line in lines if 0 <= _step_of(line) <= step]
            write_atomically(metrics, "".join(f"{line}\n" for line in kept))
            for line in kept:
                self._chains.see(_step_of(line), json.loads(line))
        for path in self._folder.glob("rollouts/*.jsonl"):
            written = re.search(r"_(\d+)$", path.stem)  # others are not ours
            if written is not None and int(written[1]) > step:
                path.unlink()
        if self._bar is not None:
            self._bar.initial = self._bar.n = max(step, 0)
            self._bar.refresh()

    def say(self, message: str) -> None:
        """See SilentTracker."""
        tqdm.write(message, file=sys.stderr)

    def close(self) -> None:
        """See SilentTracker."""
        super().close()
        if self._bar is not None:
            self._bar.close()
        for logger in self._loggers:
            logger.finalize("finished")
        if self._loggers and self._settings.create_wandb_logger:
            import wandb  # only where it is asked for

            wandb.finish()  # or the next run of this process would go on in the same W&B run
        self._loggers = []

    def _show(self, metrics: Mapping[str, float], step: int) -> None:
        """One line a step; on a terminal the bar's tail, and a line for a step that validates."""
        shown = "  ".join(f"{label} {metrics[name]:<9.4g}" for name, label in CONSOLE.items() if name in metrics)
        if self._bar is not None:
            self._bar.n = step
            self._bar.set_postfix_str(" ".join(shown.split()))
        if self._bar is None or any(name.startswith("val_") for name in metrics):
            width = len(str(self._max_steps))
            self.say(f"step {step:>{width}}/{self._max_steps}  {shown}".rstrip())


class TensorBoard:
    """Writes TensorBoard's events, with the two methods of a Lightning logger that a Tracker calls.

    Args:
        folder: of the events.
        first_step: TensorBoard drops what an earlier writer wrote from there on.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # only where it is asked for

        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """One scalar each."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def finalize(self, status: str) -> None:
        """The rest is written and the file closed."""
        self._writer.close()


def _loggers(run_folder: Path, settings: ExpManagerConfig, first_step: int) -> Iterator[Any]:
    """The loggers that are asked for; how the run was started is noted with or without any."""
    if settings.create_tensorboard_logger:
        yield TensorBoard(run_folder, first_step)
    if settings.create_mlflow_logger:
        from lightning.pytorch.loggers import MLFlowLogger  # NeMo's exp_manager would give it run_name twice

        defaults = {"experiment_name": "nemo_jepo", "run_name": _name(run_folder, settings)}
        yield MLFlowLogger(**defaults | dict(settings.mlflow_logger_kwargs))
    if settings.create_wandb_logger:
        yield from _nemo_loggers(run_folder, settings)
    else:
        _note_start(run_folder / "nemo")


def _name(run_folder: Path, settings: ExpManagerConfig) -> str:
    """What W&B and MLflow call the run: <name>, <name>/warmup."""
    return os.path.relpath(run_folder, settings.exp_dir)


def _note_start(folder: Path) -> None:
    """The command line, and commit and changes of the checkout that it was given in: a line or a part for each start.

    The files are those of NeMo's exp_manager, which takes seconds and 400 MB to import.
    """
    folder.mkdir(exist_ok=True)
    with open(folder / "cmd-args.log", "a", encoding="utf-8") as file:
        file.write(" ".join(sys.argv) + "\n")
    commit, changes = (
        subprocess.run(["git", *arguments], capture_output=True, text=True, errors="replace")
        for arguments in (("rev-parse", "HEAD"), ("diff",))
    )
    if commit.returncode == 0:
        with open(folder / "git-info.log", "a", encoding="utf-8", errors="replace") as file:
            file.write(f"commit hash: {commit.stdout}{changes.stdout}")


def _nemo_loggers(run_folder: Path, settings: ExpManagerConfig) -> list[Any]:
    """The Lightning loggers that NeMo's exp_manager makes for the run.

    exp_manager moves every file it finds in its folder into run_N, be it our metrics, so its folder is <run>/nemo. It
    is told nothing of resuming: checkpoints are not its.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what NeMo imports
        from nemo.utils import logging as nemo_logging
        from nemo.utils.exp_manager import exp_manager

    loggers: list[Any] = []
    trainer = SimpleNamespace(  # what exp_manager reads of a Lightning trainer; one device: it makes other ranks sleep
        node_rank=0,
        num_nodes=1,
        num_devices=1,
        fast_dev_run=False,
        logger=None,
        callbacks=[],
        _default_root_dir=None,
        _logger_connector=SimpleNamespace(configure_logger=loggers.extend),
    )
    wandb = {"project": "nemo_jepo", "name": _name(run_folder, settings)} | dict(settings.wandb_logger_kwargs)
    with nemo_logging.temp_verbosity(nemo_logging.ERROR):  # it prints its whole schema
        exp_manager(
            trainer,
            {
                "explicit_log_dir": str(run_folder / "nemo"),
                "create_tensorboard_logger": False,
                "create_wandb_logger": True,
                "wandb_logger_kwargs": wandb,
                "create_checkpoint_callback": False,
                "disable_validation_on_resume": False,
                "log_step_timing": False,
            },
        )
    logging.getLogger("megatron.core").setLevel(logging.WARNING)  # exp_manager left it at ERROR
    return loggers


def _json_line(record: Mapping[str, Any]) -> str:
    """One line of strict JSON: NaN and infinity, which JSON does not have, become null."""
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def metrics_of(run_folder: Path, step: int) -> dict[str, float | None]:
    """What a run has logged of one step; nothing where it has not, or only half."""
    file = run_folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n") if file.exists() else []
    return next((json.loads(line) for line in reversed(lines) if _step_of(line) == step), {})


def _step_of(line: str) -> int:
    """The step that a line of metrics.jsonl belongs to; -1 where it is no whole record."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1
