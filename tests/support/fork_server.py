"""Python processes that start in milliseconds: children of one process that has imported the heavy libraries.

    process = fork_server.start(["-m", "nemo_jepo.cli", "train", ...], environment=..., stdout=file, stderr=file)
    done = fork_server.run(["-m", "nemo_jepo.cli", "plan"])            as subprocess.run with capture_output and text

A child does what `python ARGUMENTS` does (-m MODULE, -c PROGRAM or FILE) in a process of its own, with its own
environment, working directory, signals and exit code; only the imports are done already. `start` answers with what
tests use of subprocess.Popen. What proves something about a start itself (imports, --help in a second, memory of a
fresh process) belongs in a real one.

The server starts with the first request of a test session, serves every pytest-xdist worker of it through a socket,
and ends with the session, as do its children. It has one thread when it forks, and never computes.
"""

import contextlib
import fcntl
import functools
import importlib
import os
import pickle
import runpy
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
FOLDER = "NEMO_JEPO_TEST_SESSION"
"""Environment variable: the session's folder, which tests/conftest.py makes before workers start."""
SESSION = "NEMO_JEPO_TEST_SESSION_PID"
"""Environment variable: the process with which the server ends."""

PRELOADED = (
    "torch",
    "torch.distributed.checkpoint",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "safetensors.torch",
    "megatron.core",
    "nemo_jepo.cli",
    "nemo_jepo.train",
    "nemo_jepo.evaluate",
    "nemo_jepo.checkpoint.convert",
    "nemo_jepo.tracking",
    "torch.utils.tensorboard",
)


class Process:
    """A child of the server, with the methods of subprocess.Popen that tests use."""

    def __init__(self, connection: socket.socket, arguments: Sequence[str], stdout: IO[str] | None) -> None:
        self.args, self.stdout = list(arguments), stdout
        self.returncode: int | None = None
        self._connection = connection
        (self.pid,) = struct.unpack("i", _receive(connection, 4))

    def poll(self) -> int | None:
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._ended(timeout)
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return code

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._connection, selectors.EVENT_READ)
                if selector.select(timeout):
                    (self.returncode,) = struct.unpack("i", _receive(self._connection, 4))
                    self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        if self.stdout is not None:
            self.stdout.close()
        self.wait()


def start(
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    stdin: Any = None,
    stdout: Any = None,
    stderr: Any = None,
    start_new_session: bool = False,
) -> Process:
    """`python *arguments` in a child of the server.

    Args:
        environment: of the child, whole; None gives that of this process.
        stdin: a file or descriptor; None is empty.
        stdout: a file, descriptor or subprocess.PIPE (read it at `.stdout`); None is that of this process.
        stderr: a file, descriptor or subprocess.STDOUT; None is that of this process.
    """
    reader: IO[str] | None = None
    with contextlib.ExitStack() as opened:
        if stdout is subprocess.PIPE:
            read, write = os.pipe()
            reader, stdout = open(read), opened.enter_context(open(write, "wb"))
        nothing = opened.enter_context(open(os.devnull, "r+"))
        streams = (
            nothing if stdin is None else stdin,
            1 if stdout is None else stdout,
            2 if stderr is None else stderr,
        )
        streams = [nothing if stream is subprocess.DEVNULL else stream for stream in streams]
        given, out, error = (streams[1] if stream is subprocess.STDOUT else stream for stream in streams)
        request = {
            "arguments": [str(argument) for argument in arguments],
            "environment": dict(os.environ if environment is None else environment),
            "cwd": str(cwd or os.getcwd()),
            "start_new_session": start_new_session,
        }
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(_running_server()))
        body = pickle.dumps(request)
        socket.send_fds(connection, [struct.pack("i", len(body))], [_descriptor(file) for file in (given, out, error)])
        connection.sendall(body)
        return Process(connection, arguments, reader)


def run(
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    timeout: float = 240,
) -> subprocess.CompletedProcess[str]:
    """The ended child, with its output.

    Raises:
        subprocess.TimeoutExpired: the child was killed.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        process = start(arguments, environment=environment, cwd=cwd, stdout=out, stderr=error)
        try:
            code = process.wait(timeout)
        except BaseException:
            process.kill()
            process.wait()
            raise
        out.seek(0)
        error.seek(0)
        return subprocess.CompletedProcess(process.args, code, out.read(), error.read())


def _descriptor(file: Any) -> int:
    if isinstance(file, int):
        return file
    if file.writable():
        file.flush()
    return file.fileno()


def _receive(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise EOFError("the fork server has ended")
        data += part
    return data


# ---- the server ----------------------------------------------------------------------------------------------------


@functools.cache
def _running_server() -> Path:
    """The socket of the session's server, started by whoever asks first."""
    folder = Path(os.environ[FOLDER])
    address = folder / "fork_server"
    with open(folder / "fork_server.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not address.exists():
            path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
            environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
            command = [sys.executable, "-W", "ignore", "-m", "tests.support.fork_server", str(address)]
            log = folder / "fork_server.log"
            streams = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
            streams += [(os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT, 0o600)]
            streams += [(os.POSIX_SPAWN_DUP2, 1, 2)]
            server = os.posix_spawn(sys.executable, command, environment, file_actions=streams, setsid=True)
            deadline = time.monotonic() + 120
            while not address.exists():
                assert os.waitpid(server, os.WNOHANG)[0] == 0 and time.monotonic() < deadline, log.read_text()
                time.sleep(0.02)
    return address


def make_session_folder() -> Path | None:
    """In the process that leads a test session: the folder through which its workers find one server."""
    if FOLDER in os.environ:
        return None
    folder = tempfile.mkdtemp(prefix="nemo-jepo-")
    os.environ |= {FOLDER: folder, SESSION: str(os.getpid())}
    return Path(folder)


def remove_session_folder(folder: Path | None) -> None:
    """End the server, which watches the folder, and with it whatever child a test has left."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
        del os.environ[FOLDER], os.environ[SESSION]
        _running_server.cache_clear()


def _serve(address: str) -> dict[str, Any]:
    """Fork a child for every connection. Returns in the child only, with its request."""
    wake_read, wake_write = socket.socketpair()
    wake_write.setblocking(False)
    signal.set_wakeup_fd(wake_write.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    session = os.pidfd_open(int(os.environ[SESSION]))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen(64)
    children: dict[int, socket.socket] = {}
    selector = selectors.DefaultSelector()
    for file in (wake_read, session, listener):
        selector.register(file, selectors.EVENT_READ)
    os.rename(f"{address}.new", address)
    while True:
        ready = {key.fileobj for key, _ in selector.select(timeout=1)}
        if wake_read in ready:
            wake_read.recv(4096)
        _reap(children, selector)
        for file in ready & set(children.values()):  # whoever asked for it has gone
            pid = next(pid for pid, connection in children.items() if connection is file)
            os.kill(pid, signal.SIGKILL)
            selector.unregister(file)
        if session in ready or not os.path.exists(address):
            for pid in children:
                os.kill(pid, signal.SIGKILL)
            os._exit(0)
        if listener in ready:
            connection, _ = listener.accept()
            header, files, *_ = socket.recv_fds(connection, 4, 3)
            request = pickle.loads(_receive(connection, struct.unpack("i", header)[0]))
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
                selector.close()
                os.close(session)
                for part in (wake_read, wake_write, listener, connection, *children.values()):
                    part.close()
                for descriptor, file in enumerate(files):
                    os.dup2(file, descriptor)
                    os.close(file)
                return request
            for file in files:
                os.close(file)
            connection.sendall(struct.pack("i", pid))
            children[pid] = connection
            selector.register(connection, selectors.EVENT_READ)


def _reap(children: dict[int, socket.socket], selector: selectors.BaseSelector) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        connection = children.pop(pid)
        with contextlib.suppress(OSError):
            connection.sendall(struct.pack("i", os.waitstatus_to_exitcode(status)))
        with contextlib.suppress(KeyError):
            selector.unregister(connection)
        connection.close()


# ---- the child -----------------------------------------------------------------------------------------------------


def _become(request: Mapping[str, Any]) -> None:
    """Take the place of `python *arguments`; never returns."""
    if request["start_new_session"]:
        os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"] | {"CUDA_VISIBLE_DEVICES": ""})  # a fork cannot use one
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    warnings.resetwarnings()
    warnings.filterwarnings("ignore", message=".*found in sys.modules", category=RuntimeWarning)  # by runpy
    for action in filter(None, os.environ.get("PYTHONWARNINGS", "").split(",")):
        warnings.simplefilter(action)  # type: ignore[arg-type]
    code = 1
    try:
        _execute(request["arguments"])
        code = 0
    except SystemExit as leaving:
        code = _exit_code(leaving)
    except BaseException:
        traceback.print_exc()
    _end(code)


def _execute(arguments: Sequence[str]) -> None:
    first, *rest = arguments
    if first == "-m":
        name, *rest = rest
        sys.argv = [name, *rest]
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif first == "-c":
        program, *rest = rest
        sys.argv = ["-c", *rest]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(program, "<string>", "exec"), main.__dict__)
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, str(Path(first).resolve().parent))
        runpy.run_path(first, run_name="__main__")


def _exit_code(leaving: SystemExit) -> int:
    if leaving.code is None or isinstance(leaving.code, int):
        return leaving.code or 0
    print(leaving.code, file=sys.stderr)
    return 1


def _end(code: int) -> None:
    """As the interpreter ends, without taking its modules apart."""
    import atexit

    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code & 0xFF)


def _main(address: str) -> None:
    import gc

    for name in PRELOADED:
        importlib.import_module(name)
    assert threading.active_count() == 1, threading.enumerate()
    gc.collect()
    gc.freeze()  # a child's collector then leaves the pages of the libraries shared
    _become(_serve(address))


if __name__ == "__main__":
    _main(sys.argv[1])
