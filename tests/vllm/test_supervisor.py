"""The supervisor of `nemo-jepo serve` over a program that is quicker to start than vLLM, and fails as it is told."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_jepo.rollout.vllm import supervisor
from nemo_jepo.utils.network import free_ports
from tests.support.vllm_processes import named

SERVER = """
import http.server, os, pathlib, sys, threading, time
port, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
life = folder.joinpath("lives").read_text().splitlines()[len(list(folder.glob("life_*")))]
(folder / f"life_{len(list(folder.glob('life_*')))}").write_text(os.environ["TMPDIR"])
pathlib.Path(os.environ["TMPDIR"], "socket").touch()
if life.startswith("exits"):
    sys.exit(int(life.split()[1]))

class Handler(http.server.BaseHTTPRequestHandler):
    answered = 0

    def do_GET(self):
        Handler.answered += 1
        if Handler.answered > 2 and life == "falls silent":
            time.sleep(600)
        self.send_response(503 if Handler.answered > 2 and life == "loses its engine" else 200)
        self.end_headers()
        if Handler.answered > 2 and life == "dies":
            os._exit(9)

    def log_message(self, *_):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def impatient(monkeypatch) -> Iterator[None]:
    """Short waits; and the handlers of this process's signals are put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, supervisor.STOP)}
    monkeypatch.setattr(supervisor, "HEALTH_TIMEOUT_S", 2.0)
    monkeypatch.setattr(supervisor, "MAX_SILENCES", 2)
    monkeypatch.setattr(supervisor, "LONGEST_PAUSE_S", 0.1)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def supervise(folder: Path, *lives: str, restarts: bool = True) -> int:
    """Supervise a program that lives so, one life after the other."""
    (folder / "lives").write_text("\n".join(lives))
    (port,) = free_ports()
    command = [sys.executable, "-c", SERVER, str(port), str(folder)]
    return supervisor.supervise(command, os.environ, f"http://127.0.0.1:{port}", None, restarts)


def test_a_server_that_fails_is_started_again_until_it_does_not_come_up_any_more(tmp_path, capfd, impatient):
    lives = ["dies", "loses its engine", "falls silent", "exits 1", "exits 1", "dies", *["exits 1"] * 3, "never comes"]
    assert supervise(tmp_path, *lives) == 1
    said = capfd.readouterr()
    assert said.out.count("serving http://") == 4
    reasons = [line.partition("died (")[2].partition(")")[0] for line in said.err.splitlines() if "died (" in line]
    failed = ["exit code 1"]
    assert reasons[1:] == ["/health says so", "no answer from /health for 4 s", *failed * 2, reasons[5], *failed * 3]
    assert "started again" not in said.err.splitlines()[-1]
    # Each life had a folder of its own, and nothing is left
    folders = {(tmp_path / f"life_{number}").read_text() for number in range(9)}
    assert len(folders) == 9 and not any(map(os.path.exists, folders))
    assert not named(os.getpid(), str(tmp_path))


def test_a_wrong_option_ends_it_at_once(tmp_path, impatient):
    assert supervise(tmp_path, "exits 2") == 1


def test_a_server_whose_gpu_may_be_anothers_is_not_started_again(tmp_path, impatient):
    assert supervise(tmp_path, "dies", restarts=False) == 1
