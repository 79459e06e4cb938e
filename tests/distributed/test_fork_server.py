"""A child of the fork server is what `python ARGUMENTS` is to the test that starts it."""

import signal
import subprocess

import pytest

from tests.support import fork_server


def test_a_child_has_its_own_arguments_environment_folder_and_exit_code(tmp_path):
    program = "import os, sys; print(sys.argv, os.environ, os.getcwd()); print('no', file=sys.stderr); sys.exit(7)"
    done = fork_server.run(["-c", program, "a"], environment={"ONE": "1"}, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (7, "no\n")
    assert done.stdout == f"['-c', 'a'] environ({{'ONE': '1', 'CUDA_VISIBLE_DEVICES': ''}}) {tmp_path}\n"


def test_a_module_a_file_and_a_program_run_as_main(tmp_path):
    (tmp_path / "neighbour.py").write_text("number = 3")
    file = tmp_path / "program.py"
    file.write_text("import neighbour\nif __name__ == '__main__': print(neighbour.number)")
    assert fork_server.run([str(file)]).stdout == "3\n"
    assert fork_server.run(["-c", "print(__name__)"]).stdout == "__main__\n"
    assert "usage" in fork_server.run(["-m", "calendar", "--help"]).stdout


def test_an_exception_is_a_traceback_and_code_1():
    done = fork_server.run(["-c", "1 / 0"])
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_child_as_it_ends_python(number):
    # Python notices a signal between two instructions: one that comes right before a long sleep waits for its end.
    program = "import time; print('up', flush=True)\nwhile True: time.sleep(0.01)"
    with fork_server.start(["-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout.readline() == "up\n" and process.poll() is None
        process.send_signal(number)
        assert process.wait(10) == (1 if number == signal.SIGINT else -number)  # KeyboardInterrupt is an exception


def test_a_child_that_is_too_slow_is_killed():
    with pytest.raises(subprocess.TimeoutExpired):
        fork_server.run(["-c", "import time; time.sleep(100)"], timeout=0.1)


def test_children_share_the_imports_of_one_process():
    program = "import os, sys; print(os.getppid(), 'megatron.core' in sys.modules, len(os.listdir('/proc/self/task')))"
    first, second = (fork_server.run(["-c", program]).stdout.split() for _ in range(2))
    assert first == second and first[1:] == ["True", "1"]
