"""What `nemo-jepo` imports to answer a command line that needs no machine, in processes of their own."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.quick
HEAVY = ("torch", "megatron", "nemo", "transformers", "vllm", "pyarrow", "matplotlib", "aiohttp")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["train", "wrong.key=1"], 2),
        (["train", "--config-name", "demo", "--cfg", "job"], 0),
        (["evaluate", "--config-name", "demo", "objective.beta_sup=none"], 2),
        (["checkpoint", "list", "RUN"], 0),
        (["plan", "--config-name", "jepo_8b"], 0),
        (["report", "--help"], 0),
        (["experiment", "--help"], 0),
        (["serve", "--help"], 0),
        (["demo", "--help"], 0),
    ],
)
def test_what_needs_no_machine_is_answered_before_anything_heavy_is_imported(arguments, code, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    arguments = [str(tmp_path) if word == "RUN" else word for word in arguments]
    program = (
        "import sys\n"
        "from nemo_jepo import cli\n"
        "try: code = cli.main(sys.argv[1:])\n"
        "except SystemExit as end: code = end.code\n"
        f"print('imported', *sorted(set(sys.modules) & set({HEAVY!r})))\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines()[-1] == "imported"
    assert "Traceback" not in done.stderr


def test_train_imports_nothing_that_only_some_runs_need():
    """pandas and scikit-learn come with transformers' generation, aiohttp with vLLM and judges."""
    unneeded = ("nemo", "lightning", "pandas", "sklearn", "pyarrow", "datasets", "aiohttp", "matplotlib", "math_verify")
    program = f"import sys, nemo_jepo.train; print(sorted(set(sys.modules) & set({unneeded!r})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert done.stdout == "[]\n", done.stderr
