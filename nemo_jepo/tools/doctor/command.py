"""nemo-jepo doctor [--json] [--sample] [--config-name NAME] [key=value ...]

Looks at this machine and at a run's settings, prints what it found, and exits with 2 if a run would not work. Started
once a rank (srun, torchrun), it also times the process groups and says which node has which fault. --sample lets the
run's model write 16 completions of its training prompts, and says how many have the answer marker.
"""

import os
import socket
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from hydra._internal.utils import get_args_parser
from rich.console import Console

from nemo_jepo.config import compose
from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.launcher import world_size
from nemo_jepo.config.schema import Config
from nemo_jepo.tools.doctor.findings import Finding, is_blocked, locate, show, to_json
from nemo_jepo.tools.doctor.groups import check_groups, check_shared_folder
from nemo_jepo.tools.doctor.machine import (
    check_cudnn,
    check_disk,
    check_file_system,
    check_gpus,
    check_memory,
    check_ports,
)
from nemo_jepo.tools.doctor.run import blocker, check_data, check_settings, count_parameters, look_up
from nemo_jepo.tools.doctor.samples import check_samples
from nemo_jepo.tools.doctor.versions import check_versions, check_weight_push
from nemo_jepo.utils.exit_codes import BAD_SETTINGS, DONE

MEETING_TIMEOUT = timedelta(minutes=3)


def main(argv: Sequence[str]) -> int:
    """`nemo-jepo doctor`: 2 where a run would not work. A wrong setting is a finding like any other."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return DONE
    options = {"--json", "--sample"} & set(argv)
    config, findings = read_settings([argument for argument in argv if argument not in options])
    findings += list(check_versions())
    if config is not None:
        findings += look(config, samples="--sample" in options)
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    by_rank = [(node, findings)]
    if "RANK" in os.environ and config is not None:
        try:
            by_rank = meet(config, node, findings)
        except (RuntimeError, ConfigError) as error:
            fault = Finding("blocker", "rendezvous", f"{node}: {str(error).splitlines()[0]}", "Look at the other nodes")
            by_rank = [(node, [*findings, fault])]
    located = locate(by_rank)
    if os.environ.get("RANK", "0") == "0" or len(by_rank) == 1:
        if "--json" in options:
            print(to_json(located))
        else:
            show(located, Console(file=sys.stdout))
    return BAD_SETTINGS if is_blocked(located) else DONE


def read_settings(arguments: Sequence[str]) -> tuple[Config | None, list[Finding]]:
    """The settings of a Hydra command line; None, and why, where one is wrong by itself."""
    parsed = get_args_parser().parse_args(list(arguments))
    path = parsed.config_path or parsed.config_dir
    try:
        world_size()  # a launcher's numbers are settings as well
        return compose.resolve(
            compose.compose(parsed.config_name or compose.DEFAULT_CONFIG, parsed.overrides, path)
        ), []
    except ConfigError as error:
        return None, [blocker("settings", error)]


def look(config: Config, samples: bool = False) -> list[Finding]:
    """What one rank can see for itself; only the first rank reads the data, and samples where asked."""
    num_processes, folder = world_size(), Path(config.exp_manager.exp_dir)

    def everything() -> Iterator[Finding]:
        is_first = os.environ.get("RANK", "0") == "0"
        local, about_names = look_up(config, weights=samples) if is_first else (config, [])
        yield from about_names
        known = local or config
        yield from check_settings(known, num_processes)
        yield from check_gpus(config.trainer.devices)
        yield from check_cudnn()
        num_parameters, about_model = count_parameters(known, has_weights=samples or known == config)
        yield from about_model
        yield from check_memory(known)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            yield from check_disk(folder, num_parameters, config)
            yield from check_file_system(folder)
        yield from check_ports(config)
        yield from check_weight_push(config)
        if is_first and local is not None:
            yield from check_data(local, num_processes)
            if samples:
                yield from check_samples(local)

    return list(everything())


def meet(config: Config, node: str, findings: list[Finding]) -> list[tuple[str, list[Finding]]]:
    """(node, findings) of every rank, on every rank; process groups are looked at where nothing stops them."""
    from nemo_jepo.actor import parallel

    parallel.init_distributed(MEETING_TIMEOUT)
    by_rank: list[tuple[str, list[Finding]]] = [("", [])] * dist.get_world_size()
    dist.all_gather_object(by_rank, (node, findings))
    together: list[Finding] = []
    if not is_blocked(locate(by_rank)):
        parallel.init_model_parallel(config.model)
        together += check_groups(parallel.Layout())
        together += check_shared_folder(Path(config.exp_manager.exp_dir))
    everything: list[tuple[str, list[Finding]]] = [("", [])] * dist.get_world_size()
    dist.all_gather_object(everything, (node, findings + together))
    dist.destroy_process_group()
    return everything
