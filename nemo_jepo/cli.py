"""nemo-jepo train [--config-name NAME] [key=value ...]
nemo-jepo evaluate [--model MODEL] [--config-name NAME] [key=value ...]
nemo-jepo import MODEL CHECKPOINT [model.key=value ...]
nemo-jepo export CHECKPOINT HF_DIR [model.key=value ...]
nemo-jepo plan [--nodes N] [--rollout-nodes N] [--gpu KIND] [--search] [--json] [--config-name NAME] [key=value ...]
nemo-jepo doctor [--json] [--config-name NAME] [key=value ...]
nemo-jepo experiment NAME [--seeds 1,2] [--arms jepo,rloo] [--commands] [key=value ...]
nemo-jepo checkpoint list RUN_FOLDER | verify CHECKPOINT
nemo-jepo report [RUN_FOLDER ...] [--results FILE ...] [--plots FOLDER] [--out FILE]
nemo-jepo data prepare NAME [--out FOLDER] [--from PATH] [--decontaminate SET] [options]
nemo-jepo serve MODEL_FOLDER [options]
nemo-jepo demo [key=value ...]

    train       train; exit code 0 done, 75 interrupted and saved, 2 a setting to change
    evaluate    held-out metrics of a run's newest checkpoint (or of its initial weights, or of any model) as one JSON
                object on stdout
    import      write the weights of a Hugging Face folder, a .gguf file or a hub's model as a checkpoint for any layout
    export      write a checkpoint's model as a new Hugging Face folder: config.json, safetensors, tokenizer
    plan        memory, time and cost of a run by a model, without a GPU; exit code 0 fits, 1 does not
    doctor      what would stop or slow a run here: versions, GPUs, disk, data, batches; exit code 2 on a blocker
    experiment  a named set of runs, one after another, and their metrics in one table; experiment --help lists the sets
    checkpoint  which checkpoints of a run are whole; read one again and compare every file's checksum
    report      runs and experiments as one HTML page: curves, settings that differ, rollouts token by token
    data        write a published data set (math, numina, gsm8k, math500, aime25, ...) or a file of your own as Parquet
                with a manifest, cleaned as you ask
    serve       a vLLM server for rollouts, until it is stopped; serve --help lists its options
    demo        train a small model on this machine's CPU, then show what it learned

train and evaluate print their resolved settings with --cfg job. Several processes: torchrun, or srun with RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set.
"""

import importlib
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from nemo_jepo.config.errors import ConfigError, DataError, RunError
from nemo_jepo.config.reading import line_of
from nemo_jepo.utils import early_signals
from nemo_jepo.utils.exit_codes import BAD_SETTINGS, DONE, ENDED_AT_ONCE, FAILED, INTERRUPTED

COMMANDS = {
    "train": "nemo_jepo.train:main",
    "evaluate": "nemo_jepo.evaluate:main",
    "import": "nemo_jepo.checkpoint.convert:import_main",
    "export": "nemo_jepo.checkpoint.convert:export_main",
    "plan": "nemo_jepo.tools.plan.command:main",
    "doctor": "nemo_jepo.tools.doctor.command:main",
    "experiment": "nemo_jepo.tools.experiments:main",
    "checkpoint": "nemo_jepo.checkpoint.command:main",
    "report": "nemo_jepo.tools.report.command:main",
    "data": "nemo_jepo.tools.prepare.command:main",
    "serve": "nemo_jepo.rollout.vllm.server:main",
    "demo": "nemo_jepo.tools.demo:main",
}
"""What runs a command: MODULE:FUNCTION, imported when the command is asked for. It takes the arguments after the
command's name, gives the exit code, and raises for what the user must change."""
WITH_SETTINGS = {
    "train": "interrupted during the start; nothing is lost, and the same command starts again",
    "evaluate": "interrupted; the same command evaluates again",
}
"""Commands whose function takes a `Config`: it is read first, so that a wrong setting is answered before torch and
Megatron are imported. With the line that a signal ends them with, until training begins."""
EXIT_CODES: dict[type[BaseException], int] = {ConfigError: BAD_SETTINGS, DataError: BAD_SETTINGS, RunError: FAILED}
"""Errors that are one line on stderr. So are those of the system that nothing below has answered (`line_of`); any other
is a bug and leaves its traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """The console script: arguments without the program's name in, exit code out."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name not in COMMANDS:
        asked = name in ("-h", "--help", "help")
        print(__doc__, file=sys.stdout if asked else sys.stderr)
        return DONE if asked else BAD_SETTINGS
    if argv is None:  # this process is the command's own
        heed_signals(name)
    for library in ("megatron", "torch", "nemo", "lightning", "transformers"):
        warnings.filterwarnings("ignore", module=rf"{library}\b")  # of the libraries about their own code
    try:
        return run(name, rest)
    except tuple(EXIT_CODES) as error:
        print(error, file=sys.stderr)
        return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
    except (OSError, MemoryError) as error:
        print(line_of(error), file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return ENDED_AT_ONCE


def heed_signals(name: str) -> None:
    """Have the command end with one line at a signal, from here until it has a way of its own."""
    if name in WITH_SETTINGS:
        early_signals.end_at(early_signals.ENDING, WITH_SETTINGS[name], INTERRUPTED)
    else:
        early_signals.end_at([signal.SIGINT], "interrupted", ENDED_AT_ONCE)


def run(name: str, argv: list[str]) -> int:
    """The exit code of a command; raises what the command raises."""
    if name not in WITH_SETTINGS:
        command = load(COMMANDS[name])
        early_signals.release()  # what it has begun it clears up
        return command(argv)
    from nemo_jepo.config.compose import read_command_line  # Hydra, which half of the commands do without

    config = read_command_line(argv, trains=name == "train")
    return DONE if config is None else load(COMMANDS[name])(config)


def load(target: str) -> Callable[[Any], int]:
    """The function that MODULE:FUNCTION names."""
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


if __name__ == "__main__":
    sys.exit(main())
