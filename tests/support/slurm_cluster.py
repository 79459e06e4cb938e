"""A real Slurm cluster on this machine: munged, slurmctld and one slurmd for every pretended node.

Nodes are node1, node2, ... at 127.0.1.1, 127.0.1.2, ...; they share this machine's processes, files and ports. No root,
no systemd, no cgroups, no accounting; every daemon is a child of the test and ends with it.
"""

import os
import pwd
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from nemo_jepo.utils.network import free_ports
from nemo_jepo.utils.processes import die_with_parent

SYSTEM_PATHS = f"{os.environ['PATH']}:/usr/sbin:/sbin"  # where Debian keeps daemons
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
MISSING = [program for program in PROGRAMS if shutil.which(program, path=SYSTEM_PATHS) is None]
needs_slurm = pytest.mark.skipif(
    bool(MISSING),
    reason=f"needs Slurm ({', '.join(MISSING)}): apt-get install slurmctld slurmd slurm-client munge",
)

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
JobRequeue=1
ReturnToService=2
KillWait=5
MinJobAge=3600
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
MailProg=/bin/true
{nodes}
PartitionName=test Nodes=ALL Default=YES State=UP
"""


class Cluster:
    """Submit to it, look at jobs, wait for them."""

    def __init__(self, folder: Path) -> None:
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": SYSTEM_PATHS}

    def run(self, *command: str, environment: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """The output of one of Slurm's commands."""
        variables = self.environment | dict(environment or {})
        done = subprocess.run(command, env=variables, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, folder: Path, environment: Mapping[str, str], *arguments: str) -> str:
        """The number of the job that `sbatch *arguments` starts in a folder."""
        return self.run("sbatch", "--parsable", *arguments, environment=environment, cwd=folder)

    def job(self, number: str) -> dict[str, str]:
        """What scontrol says of a job: JobState, ExitCode, Restarts, ..."""
        return dict(re.findall(r"(\w+)=(\S+)", self.run("scontrol", "show", "job", "--oneliner", number)))

    def wait(self, number: str, seconds: float = 240) -> dict[str, str]:
        """The same, when the job has ended for good."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"):
            assert time.monotonic() < deadline, f"job {number} is still {job['JobState']}"
            time.sleep(0.2)
        return job


@contextmanager
def running_cluster(folder: Path, num_nodes: int) -> Iterator[Cluster]:
    """A cluster of idle nodes with 4 (pretended) cores each, until the block ends.

    Args:
        folder: for its configuration, state and logs; a short path, for there is a socket in it.
    """
    names = [f"node{index}" for index in range(1, num_nodes + 1)]
    controller_port, *ports = free_ports(1 + num_nodes)
    host = socket.gethostname().split(".")[0]
    nodes = [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.1.{index} Port={port} CPUs=4 State=UNKNOWN"
        for index, (name, port) in enumerate(zip(names, ports, strict=True), start=1)
    ]
    user = pwd.getpwuid(os.getuid()).pw_name
    configuration = folder / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(
            host=host, user=user, folder=folder, controller_port=controller_port, nodes="\n".join(nodes)
        )
    )
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (folder / "state").mkdir()
    for name in names:
        (folder / f"spool.{name}").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "seed")]
    daemons = [
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.sock", *munge],
        ["slurmctld", "-D", "-c", "-f", str(configuration)],
        *[["slurmd", "-D", "-N", name, "-f", str(configuration)] for name in names],
    ]
    cluster, started = Cluster(folder), []
    try:
        for index, command in enumerate(daemons):
            with (folder / f"{index}_{command[0]}.log").open("wb") as log:
                started.append(
                    subprocess.Popen(
                        command, env=cluster.environment, stdout=log, stderr=log, preexec_fn=die_with_parent
                    )
                )
            _until(lambda: (folder / "munge.sock").exists(), folder)
        idle = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
        ask = lambda: subprocess.run(idle, env=cluster.environment, capture_output=True, text=True)  # noqa: E731
        _until(lambda: ask().stdout.strip() == str(num_nodes), folder)
        try:
            yield cluster
        finally:
            numbers = cluster.run("squeue", "--noheader", "--format=%A").split()
            if numbers:
                cluster.run("scancel", *numbers)  # or their steps would outlive the daemons
                _until(lambda: not cluster.run("squeue", "--noheader"), folder)
    finally:
        for daemon in reversed(started):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        _kill_what_is_left(configuration)


def _kill_what_is_left(configuration: Path) -> None:
    """Steps of a test that was interrupted: they are nobody's children."""
    for process in psutil.process_iter():
        try:
            if process.environ().get("SLURM_CONF") == str(configuration):
                process.kill()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


def _until(condition, folder: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            logs = [f"{path.name}:\n{path.read_text()[-1500:]}" for path in sorted(folder.glob("*.log"))]
            raise AssertionError("the cluster is not ready\n" + "\n".join(logs))
        time.sleep(0.1)
