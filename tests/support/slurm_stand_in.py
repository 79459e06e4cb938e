"""Stands in for `python` in the Slurm tests: `THIS -m nemo_jepo.cli COMMAND ...` in milliseconds instead of minutes.

Every call adds {command, arguments, node, environment} as a line to $STAND_IN/calls.jsonl. What it does then:

    --help  lists the commands, the doctor among them
    doctor  fails on $STAND_IN_SICK_NODE
    serve   answers 200 on every path until SIGTERM; does not listen with $STAND_IN_MUTE; dies once if
            $STAND_IN/die_once exists
    train   ends when $STAND_IN/end_training exists, with the number in it; or on SIGUSR1 with 75
"""

import http.server
import json
import os
import signal
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ["STAND_IN"])
NODE = os.environ.get("SLURMD_NODENAME", "none")


def record(command, arguments):
    known = ("MASTER_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_", "PYTORCH_", "OMP_", "SLURM_RESTART")
    environment = {name: value for name, value in os.environ.items() if name.startswith(known)}
    call = {"command": command, "arguments": arguments, "node": NODE, "environment": environment, "pid": os.getpid()}
    with (FOLDER / "calls.jsonl").open("a") as file:
        file.write(json.dumps(call) + "\n")


class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *parts):
        pass


def serve(arguments):
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    if (FOLDER / "die_once").exists():
        (FOLDER / "die_once").unlink()
        return 1
    if "STAND_IN_MUTE" in os.environ:
        time.sleep(600)
    place = arguments[arguments.index("--host") + 1], int(arguments[arguments.index("--port") + 1])
    http.server.ThreadingHTTPServer(place, Healthy).serve_forever()


def train(arguments):
    end = FOLDER / "end_training"
    signal.signal(signal.SIGUSR1, lambda number, frame: os._exit(75))
    while not end.exists():
        time.sleep(0.05)
    return int(end.read_text() or 0)


def main():
    assert sys.argv[1:3] == ["-m", "nemo_jepo.cli"], sys.argv
    command, *arguments = sys.argv[3:]
    if command == "--help":
        print("    train       train\n    doctor      check\n    serve       serve")
        return 0
    record(command, arguments)
    if command == "doctor":
        if NODE == os.environ.get("STAND_IN_SICK_NODE"):
            print("         subject  finding\nblocker  GPU      number 3 is gone\nok       disk     there is some")
            return 2
        return 0
    return {"serve": serve, "train": train}[command](arguments)


if __name__ == "__main__":
    sys.exit(main())
