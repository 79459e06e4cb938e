"""The table of commands, and what an error becomes: one line and an exit code."""

import errno
import sys

import pytest

from nemo_jepo import cli
from nemo_jepo.checkpoint.writer import CheckpointNotWritten
from nemo_jepo.config.errors import ConfigError, DataError
from nemo_jepo.rollout.sampler import SamplerMismatch
from nemo_jepo.tools.plan import command

ERRORS = {
    "a setting": (ConfigError("model.seed", -1, "must be at least 0", "Raise it"), 2),
    "data": (DataError("train.jsonl:3: no answer. Add one."), 2),
    "the sampler": (SamplerMismatch("the servers' log-probs are 2.1 nats away"), 1),
    "a full disk": (CheckpointNotWritten("a checkpoint could not be written (no space left)"), 1),
    "Ctrl-C": (KeyboardInterrupt("interrupted"), 130),
}


def raising(error: BaseException):
    def main(argv: list[str]) -> int:
        raise error

    return main


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_there_and_the_usage_names_it(name):
    assert callable(cli.load(cli.COMMANDS[name]))
    assert f"\n    {name} " in cli.__doc__


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_is_one_line_on_stderr_and_an_exit_code(error, monkeypatch, capsys):
    raised, code = ERRORS[error]
    monkeypatch.setattr(command, "main", raising(raised))
    assert cli.main(["plan"]) == code
    assert capsys.readouterr() == ("", f"{raised}\n")


def test_a_bug_leaves_its_traceback(monkeypatch):
    monkeypatch.setattr(command, "main", raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["plan"])


def test_a_command_gets_the_arguments_after_its_name_and_gives_the_exit_code(monkeypatch):
    seen: list[list[str]] = []
    monkeypatch.setattr(command, "main", lambda argv: seen.append(argv) or 75)
    assert cli.main(["plan", "--nodes", "2"]) == 75
    monkeypatch.setattr(sys, "argv", ["nemo-jepo", "plan", "model.seed=1"])
    assert cli.main() == 75
    assert seen == [["--nodes", "2"], ["model.seed=1"]]


def test_without_a_command_the_usage_goes_to_stderr_and_with_help_to_stdout(capsys):
    for arguments in ([], ["trian"], [""]):
        assert cli.main(arguments) == 2
        assert capsys.readouterr() == ("", f"{cli.__doc__}\n")
    for word in ("-h", "--help", "help"):
        assert cli.main([word]) == 0
        assert capsys.readouterr() == (f"{cli.__doc__}\n", "")


def test_an_error_of_the_system_that_nobody_answers_is_one_line_and_a_bug_keeps_its_traceback(monkeypatch, capsys):
    full = OSError(errno.ENOSPC, "No space left on device", "/out/metrics.jsonl")
    monkeypatch.setattr(command, "main", raising(full))
    assert cli.main(["plan"]) == 1
    line = "/out/metrics.jsonl: cannot be written (No space left on device), in nemo_jepo.cli. "
    assert capsys.readouterr() == ("", f"{line}Make room there, or give another place.\n")
    monkeypatch.setattr(command, "main", raising(AssertionError("ours")))
    with pytest.raises(AssertionError, match="ours"):
        cli.main(["plan"])
