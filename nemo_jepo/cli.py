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

import importlib
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from nemo_jepo.checkpoint.format import checkpoint_command
from nemo_jepo.config import compose
from nemo_jepo.config.errors import ConfigError, DataError
from nemo_jepo.rollout.vllm import server
from nemo_jepo.tools import plan

USAGE = __doc__
FAILED, INTERRUPTED = 1, 75


def convert(command: str, source: str, target: str, *overrides: str) -> int:
    """import or export between Hugging Face folders and checkpoints."""
    from nemo_jepo.checkpoint.convert import export_hf_folder, import_hf

    return (import_hf if command == "import" else export_hf_folder)(Path(source), Path(target), overrides)


COMMANDS = {"train": "nemo_jepo.train", "evaluate": "nemo_jepo.evaluate"}


def run(name: str, argv: list[str]) -> int:
    """train or evaluate: settings first, so that a wrong one is answered before anything heavy is imported."""
    config = compose.read_command_line(argv)
    return 0 if config is None else importlib.import_module(COMMANDS[name]).main(config)


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
    return _in_one_line(partial(run, sys.argv[1], sys.argv[2:]))


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
