"""Stands in for srun, scontrol and scancel: records what a job script would run, without a Slurm.

Copied under these names into a folder on PATH. Nodes are node1 to node$SLURM_JOB_NUM_NODES at 127.0.2.1 and on. Each
srun is a line of $RECORD/srun.jsonl; the one of the rollout servers answers on their ports until scancel.
"""

import http.server
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

FOLDER = Path(os.environ["RECORD"])


class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *parts):
        pass


def srun(arguments):
    with (FOLDER / "srun.jsonl").open("a") as file:
        file.write(json.dumps(arguments) + "\n")
    if "server_task" not in arguments:
        return
    places, port = arguments[arguments.index("server_task") + 1 :][:2]
    tasks = next(int(part.split("=")[1]) for part in arguments if part.startswith("--ntasks-per-node="))
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    for place in places.split():
        for task in range(tasks):
            server = http.server.ThreadingHTTPServer((place.split("=")[1], int(port) + 1 + task), Healthy)
            threading.Thread(target=server.serve_forever, daemon=True).start()
    (FOLDER / "servers.pid").write_text(str(os.getpid()))
    time.sleep(60)


def scontrol(arguments):
    if arguments[:2] == ["show", "hostnames"]:
        print("\n".join(f"node{index}" for index in range(1, int(os.environ["SLURM_JOB_NUM_NODES"]) + 1)))
    elif arguments[:2] == ["show", "node"]:
        print(f"NodeName={arguments[2]} NodeAddr=127.0.2.{arguments[2].removeprefix('node')} State=ALLOCATED")


def scancel(arguments):
    os.kill(int((FOLDER / "servers.pid").read_text()), signal.SIGTERM)


if __name__ == "__main__":
    {"srun": srun, "scontrol": scontrol, "scancel": scancel}[Path(sys.argv[0]).name](sys.argv[1:])
