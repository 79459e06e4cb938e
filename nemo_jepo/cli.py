"""nemo-jepo train|evaluate [--config-name NAME] [key=value ...]
nemo-jepo import HF_DIR CHECKPOINT [model.key=value ...]
nemo-jepo export CHECKPOINT HF_DIR [model.key=value ...]
nemo-jepo plan [--nodes N] [--rollout-nodes N] [--gpu KIND] [--search] [--json] [--config-name NAME] [key=value ...]
nemo-jepo doctor [--json] [--config-name NAME] [key=value ...]
nemo-jepo experiment NAME [--seeds 1,2] [--arms jepo,rloo] [--commands] [key=value ...]
nemo-jepo checkpoint list RUN_FOLDER | verify CHECKPOINT
nemo-jepo report [RUN_FOLDER ...] [--results FILE ...] [--figures FOLDER] [--out FILE]
nemo-jepo data prepare NAME [--out FOLDER] [--from PATH] [--revision REVISION] [--workers N]
nemo-jepo serve MODEL_FOLDER [options]

    train       train; exit code 0 done, 75 interrupted and saved, 2 a setting to change
    evaluate    held-out figures of a run's newest checkpoint (or of its initial weights) as one JSON object on stdout
    import      write the weights of a Hugging Face folder as a checkpoint that every parallel layout loads
    export      write a checkpoint's model as a new Hugging Face folder: config.json, safetensors, tokeniser
    plan        memory, time and cost of a run by a model, without a GPU; exit code 0 fits, 1 does not
    doctor      what would stop or slow a run here: versions, GPUs, disk, data, batches; exit code 2 on a blocker
    experiment  a named set of runs, one after another, and their metrics in one table; experiment --help lists the sets
    checkpoint  which checkpoints of a run are whole; read one again and compare every file's checksum
    report      runs and experiments as one HTML page: curves, settings that differ, rollouts token by token
    data        write a published data set (math, numina, numina_proof, gsm8k, proofnet) as Parquet with a manifest
    serve       a vLLM server for rollouts, until it is stopped; serve --help lists its options

train and evaluate print their resolved settings with --cfg job. Several processes: torchrun, or srun with RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set.
"""

import dataclasses
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from nemo_jepo.checkpoint.format import checkpoint_command
from nemo_jepo.config import compose
from nemo_jepo.config.errors import ConfigError, DataError
from nemo_jepo.config.schema import Config, PretrainedConfig
from nemo_jepo.rollout.vllm import server
from nemo_jepo.tools import plan

if TYPE_CHECKING:
    from nemo_jepo.rollout.build import OwnServers

USAGE = __doc__
FAILED, INTERRUPTED = 1, 75


class Interrupt:
    """Set by SIGTERM, SIGINT or SIGUSR1; the run finishes its step, saves and ends. A second SIGINT ends at once."""

    def __init__(self) -> None:
        self._received = False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = True

    def __call__(self) -> bool:
        return self._received


def warmup_config(config: Config) -> Config:
    """The supervised run before the main one: the same data, model and machines, its own length and learning rate."""
    warmup = config.warmup
    return dataclasses.replace(
        config,
        warmup=dataclasses.replace(warmup, max_steps=0),
        objective=dataclasses.replace(
            config.objective, name="sft", sft_target=warmup.sft_target, length_normalization="tokens"
        ),
        kl=dataclasses.replace(config.kl, beta=0.0),
        model=dataclasses.replace(
            config.model, optim=dataclasses.replace(config.model.optim, lr=warmup.lr, sched=warmup.sched)
        ),
        trainer=dataclasses.replace(
            config.trainer,
            jepo=dataclasses.replace(
                config.trainer.jepo,
                max_steps=warmup.max_steps,
                max_epochs=None,
                num_prompts_per_step=warmup.num_prompts_per_step,
                num_generations_per_prompt=1,
                val_check_interval=0,
                val_at_start=False,
                keep_checkpoints=1,
            ),
        ),
    )


def after_warmup(config: Config, folder: Path) -> Config:
    """The main run, started from the warm-up's last checkpoint."""
    from nemo_jepo.checkpoint.format import latest_checkpoint

    path = latest_checkpoint(folder / "warmup" / "checkpoints")
    assert path is not None, "a warm-up that ended has saved"
    return dataclasses.replace(started_from(config, path), warmup=dataclasses.replace(config.warmup, max_steps=0))


def started_from(config: Config, checkpoint: Path) -> Config:
    """The same run with another beginning: a checkpoint, which knows its own shape and tokeniser."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, hf_config={}, hf_config_path=None),
        pretrained_checkpoint=PretrainedConfig(restore_from_path=str(checkpoint)),
    )


def run_folder(config: Config) -> Path:
    """<exp_dir>/<name>."""
    return Path(config.exp_manager.exp_dir) / config.exp_manager.name


def train(config: Config) -> int:
    """The warm-up if one is asked for, then the main run; both resume where they were."""
    _start_machines(config)
    from nemo_jepo.rollout.build import OwnServers

    interrupt, folder = Interrupt(), run_folder(config)
    with OwnServers(folder) as servers:
        if config.warmup.max_steps:
            code = _fit(warmup_config(config), folder / "warmup", servers, interrupt)
            if code:
                return code
            config = after_warmup(config, folder)
        return _fit(config, folder, servers, interrupt)


def evaluate(config: Config) -> int:
    """Figures of the run's newest checkpoint, else of the model that the config starts from."""
    _start_machines(config)
    from nemo_jepo.actor.parallel import Layout
    from nemo_jepo.checkpoint.format import latest_checkpoint
    from nemo_jepo.evaluate import evaluate as evaluate_rooms
    from nemo_jepo.rollout.build import OwnServers
    from nemo_jepo.setup import build_rooms

    folder, layout = run_folder(config), Layout()
    newest = latest_checkpoint(folder / "checkpoints") or latest_checkpoint(folder / "warmup" / "checkpoints")
    if newest is not None:
        config = started_from(config, newest)
    with OwnServers(folder) as servers, closing(build_rooms(config, folder, layout, servers)) as rooms:
        if not rooms.validation:
            raise ConfigError("data.validation_path", None, "evaluate reads it", "Add data.validation_path=FILE")
        figures, _ = evaluate_rooms(rooms, rooms.validation)
    if layout.rank == 0:
        source = str(newest or config.pretrained_checkpoint.restore_from_path or "random initialisation")
        always = dict.fromkeys(("accuracy", "proxy_nll", "marker_rate", "cot_tokens_mean"))
        if config.evaluation.judge.url is not None:
            always["combined_accuracy"] = None
        print(json.dumps({"model": source, "num_prompts": len(rooms.validation)} | always | figures), flush=True)
    return 0


def _start_machines(config: Config) -> None:
    from nemo_jepo.actor import parallel

    parallel.init_distributed()
    parallel.init_model_parallel(config.model)


def _fit(config: Config, folder: Path, servers: "OwnServers", interrupt: Callable[[], bool]) -> int:
    from nemo_jepo.actor.parallel import Layout
    from nemo_jepo.checkpoint.format import latest_checkpoint, step_of
    from nemo_jepo.setup import build_rooms
    from nemo_jepo.tracking import SilentTracker, Tracker
    from nemo_jepo.train import fit

    layout, steps = Layout(), config.trainer.jepo.max_steps
    newest = latest_checkpoint(folder / "checkpoints")
    done = 0 if newest is None else step_of(newest)
    layout.barrier()  # nobody looks for checkpoints while rank 0 already writes one
    if newest is not None and not config.exp_manager.resume_if_exists:
        fix = "Choose another name, or exp_manager.resume_if_exists=true"
        raise ConfigError("exp_manager.name", config.exp_manager.name, f"{newest} exists", fix)
    if done >= steps:
        return 0
    rooms = build_rooms(config, folder, layout, servers)
    tracker = Tracker(folder, config.exp_manager, steps, done + 1) if layout.rank == 0 else SilentTracker()
    with closing(rooms), tracker:
        tracker.save_config(compose.to_yaml(config))
        return fit(rooms, folder, tracker, interrupt)


def convert(command: str, source: str, target: str, *overrides: str) -> int:
    """import or export between Hugging Face folders and checkpoints."""
    from nemo_jepo.checkpoint.convert import export_hf_folder, import_hf

    return (import_hf if command == "import" else export_hf_folder)(Path(source), Path(target), overrides)


COMMANDS: dict[str, Callable[[Config], int]] = {"train": train, "evaluate": evaluate}


def _hydra_runner() -> compose.Runner | None:
    """NeMo's on rank 0; the other ranks are spared its seconds and its 400 MB."""
    if os.environ.get("RANK", "0") != "0":
        return None
    logging.disable(logging.WARNING)  # of what NeMo imports
    from nemo.core.config import hydra_runner

    logging.disable(logging.NOTSET)
    return hydra_runner


def main() -> int:
    """The console script: sys.argv in, exit code out."""
    for library in ("megatron", "torch", "nemo", "lightning", "transformers"):
        warnings.filterwarnings("ignore", module=rf"{library}\b")  # of the libraries about their own code
    if sys.argv[1:2] == ["serve"]:
        return _in_one_line(partial(server.main, sys.argv[2:]))
    if sys.argv[1:2] == ["plan"]:
        return plan.main(sys.argv[2:])
    if sys.argv[1:2] == ["doctor"]:
        from nemo_jepo.tools.doctor.command import main as doctor

        return doctor(sys.argv[2:])
    if sys.argv[1:2] == ["experiment"]:
        from nemo_jepo.tools import experiments

        return _in_one_line(partial(experiments.main, sys.argv[2:]))
    if sys.argv[1:2] == ["report"]:
        from nemo_jepo.tools.report.command import main as report

        return report(sys.argv[2:])
    if sys.argv[1:2] == ["checkpoint"]:
        return checkpoint_command(sys.argv[2:])
    if sys.argv[1:2] == ["data"]:
        from nemo_jepo.rewards.verifiable import verifiable_answers
        from nemo_jepo.tools.prepare.command import main as data

        return data(sys.argv[2:], verifiable_answers)
    if len(sys.argv) >= 4 and sys.argv[1] in ("import", "export"):
        return _in_one_line(partial(convert, *sys.argv[1:]))
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        wanted = sys.argv[1:2] and sys.argv[1] in ("-h", "--help", "help")
        print(USAGE, file=sys.stdout if wanted else sys.stderr)
        return 0 if wanted else 2
    command = COMMANDS[sys.argv[1]]
    return compose.run(lambda config: _in_one_line(partial(command, config)), sys.argv[2:], _hydra_runner)


def _in_one_line(command: Callable[[], int]) -> int:
    """The command's exit code; a mistake of the user's is one line on stderr and 2."""
    from torch.distributed.checkpoint.api import CheckpointException

    from nemo_jepo.rollout.sampler import SamplerMismatch

    try:
        return command()
    except SamplerMismatch as error:
        print(error, file=sys.stderr)
        return FAILED
    except CheckpointException as error:
        causes = {str(cause).splitlines()[0] for cause, _ in error.failures.values()}
        rest = "Older checkpoints are whole; make room and start the run again."
        print(f"a checkpoint could not be written ({', '.join(sorted(causes))}). {rest}", file=sys.stderr)
        return FAILED
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return compose.BAD_SETTINGS


if __name__ == "__main__":
    sys.exit(main())
