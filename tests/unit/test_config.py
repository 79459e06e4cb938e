"""Every conf file loads and passes; wrong keys, files and command lines end in one line that says what to change."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
import yaml

from nemo_jepo.config import compose
from nemo_jepo.config.check import check
from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.objectives import OBJECTIVES

CONF = Path(__file__).parents[2] / "conf"
RECIPES = sorted(path.stem for path in CONF.glob("*.yaml"))
SHAPE = {"model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 320}


@pytest.fixture
def needed(tmp_path):
    """Overrides that a recipe leaves to its user: a data file, a model folder."""
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    return {
        "demo": [],
        "mini": [],
        "mini_verifiable": [],
        "mini_semi": [],
        "mini_unverifiable": [],
        "jepo_tiny": [],
        "gsm8k_small": [f"data.train_path={tmp_path}/rows.jsonl"],
        "proofnet_small": [f"data.train_path={tmp_path}/rows.jsonl"],
        "jepo": [f"data.train_path={tmp_path}/rows.jsonl", f"pretrained_checkpoint.restore_from_path={tmp_path}"],
        "jepo_8b": [f"data.train_path={tmp_path}/rows.jsonl"],
        "jepo_8b_fp8": [f"data.train_path={tmp_path}/rows.jsonl"],
        "jepo_numina": [f"data.train_path={tmp_path}/rows.jsonl"],
        "jepo_numina_proof": [f"data.train_path={tmp_path}/rows.jsonl"],
        "jepo_70b": [f"data.train_path={tmp_path}/rows.jsonl", "rollout.servers=[http://node:8000]"],
        "jepo_70b_fp8": [f"data.train_path={tmp_path}/rows.jsonl", "rollout.servers=[http://node:8000]"],
    }


def load(name, *overrides, folder=None):
    return compose.resolve(compose.compose(name, overrides, folder))


def error_of(name, *overrides, world_size=1, folder=None):
    """The one line that the given settings end in."""
    with pytest.raises(ConfigError) as caught:
        check(load(name, *overrides, folder=folder), world_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- conf/


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_passes_every_check(name, needed):
    config = load(name, *needed[name])
    check(config, world_size=config.trainer.num_nodes * config.trainer.devices)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_a_choice_that_passes_every_check(name):
    config = load("demo", f"objective={name}")
    assert config.objective.name == name
    check(config, world_size=1)


@pytest.mark.parametrize("group", ["data", "objective", "rollout"])
def test_a_group_file_sets_the_name_it_has(group):
    for path in (CONF / group).glob("*.yaml"):
        assert getattr(load("demo", f"{group}={path.stem}"), group).name == path.stem


# ---- keys


@pytest.mark.parametrize("form", ["", "+", "++"])
def test_unknown_override_names_the_nearest_key(form):
    line = error_of("demo", f"{form}model.tensor_parallel_size=4")
    assert line == "model.tensor_parallel_size=4: no such key. Did you mean model.tensor_model_parallel_size."


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("trainer.jepo.max_step", "trainer.jepo.max_steps"),
        ("trainer.max_steps", "trainer.jepo.max_steps"),
        ("trainer.grpo.val_check_interval", "trainer.jepo.val_check_interval"),
        ("objectve", "objective"),
        ("kl.bta", "kl.beta"),
        ("model.lr", "model.optim.lr"),
        ("model.optim.weight_decy", "model.optim.weight_decay"),
    ],
)
def test_nearest_key_finds_the_misspelt_and_the_misplaced(key, nearest):
    assert compose.nearest_key(key) == nearest


def test_parallel_sizes_may_be_given_with_two_plus_signs():
    assert load("demo", "++model.tensor_model_parallel_size=4").model.tensor_model_parallel_size == 4


def test_free_form_nodes_take_any_key_inside():
    config = load("demo", "+model.hf_config.rope_theta=5e5", "++model.hf_config.rope_scaling={factor: 2}")
    assert config.model.hf_config["rope_theta"] == 5e5
    assert config.model.hf_config["rope_scaling"] == {"factor": 2}
    assert "+model.hf_config.rope_theta=VALUE" in error_of("demo", "model.hf_config.rope_theta=5e5")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model: {optim: {lrr: 1}}", "model.optim.lrr (in own.yaml): no such key. Did you mean model.optim.lr."),
        ("model: {seed: x}", "model.seed (in own.yaml): Value 'x' of type 'str' could not be converted to Integer."),
    ],
)
def test_a_wrong_line_of_a_conf_file_is_named_with_its_file(tmp_path, text, line):
    (tmp_path / "own.yaml").write_text(f"defaults: [nemo_jepo_schema, _self_]\n{text}\n")
    assert error_of("own", folder=tmp_path) == line


@pytest.mark.parametrize(
    ("overrides", "beginning"),
    [
        (["model.seed=x"], "model.seed=x: Value 'x'"),
        (["objective=ppo"], "objective=ppo (in demo.yaml): no such choice. Choose one of avg_logprob, jepo, "),
        (["exp_manager.name=???"], "exp_manager.name: has no default. Add exp_manager.name="),
        (["model=1"], "model=1: "),
        (["model.seed"], "Error parsing override 'model.seed'"),
        (["model.seed=${no.such}"], "model.seed: Interpolation key 'no.such' not found"),
    ],
)
def test_errors_of_hydra_become_one_line(overrides, beginning):
    assert error_of("demo", *overrides).startswith(beginning)


def test_an_unknown_recipe_lists_those_there_are():
    line = error_of("no_such")
    assert line.startswith("--config-name no_such: no such file. ") and all(name in line for name in RECIPES)


def test_malformed_yaml_names_file_and_line(tmp_path):
    (tmp_path / "own.yaml").write_text("model: {seed: 1}\ntrainer: [\n")
    assert f'in "{tmp_path}/own.yaml", line 3' in error_of("own", folder=tmp_path)


def test_a_saved_config_is_read_again_as_it_was(tmp_path):
    config = load("demo", "model.optim.betas=[0.8,0.9]", "objective=rloo")
    (tmp_path / "config.yaml").write_text(compose.to_yaml(config))
    assert load("config", folder=tmp_path) == config
    assert load("config", "model.seed=8", folder=tmp_path).model.seed == 8


def test_a_conf_file_without_the_schema_is_as_strict(tmp_path):
    (tmp_path / "own.yaml").write_text("model: {seeds: 1}\n")
    assert error_of("own", folder=tmp_path) == "model.seeds: no such key. Did you mean model.seed."


# ---- the command line


def test_a_command_line_gives_checked_settings():
    config = compose.read_command_line(["--config-name", "demo", "objective=rloo", "model.seed=5"])
    assert config is not None
    assert (config.objective.name, config.rollout.stop_at_marker, config.model.seed) == ("rloo", False, 5)
    with pytest.raises(ConfigError, match="^trainer.num_nodes . trainer.devices=2: 1 processes were started"):
        compose.read_command_line(["--config-name", "demo", "trainer.devices=2"])
    with pytest.raises(ConfigError, match="^--multirun=True: "):
        compose.read_command_line(["--multirun"])


def test_help_names_recipes_groups_and_sections(capsys):
    assert compose.read_command_line(["--help"]) is None
    text = capsys.readouterr().out
    assert all(f"    {name} " in text for name in [*RECIPES, "data", "objective", "rollout", "trainer", "warmup"])


def test_a_printed_config_is_resolved_and_needs_no_missing_value(capsys):
    assert compose.read_command_line(["--cfg", "job", "exp_manager.name=???"]) is None
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["objective"]["name"] == "jepo" and printed["kl"]["beta"] == 1e-3
    assert compose.read_command_line(["--cfg", "job", "--package", "kl"]) is None
    assert yaml.safe_load(capsys.readouterr().out) == printed["kl"]
    with pytest.raises(ConfigError, match="^--package='no.such': is no section"):
        compose.read_command_line(["--cfg", "job", "--package", "no.such"])


def run(argv, task):
    """`compose.run` with Hydra's own decorator, which NeMo's has the interface of."""
    quiet = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none"]
    return compose.run(task, [*argv, *quiet], lambda: functools.partial(hydra.main, version_base="1.3"))


def test_a_run_gets_the_settings_of_its_command_line_and_gives_the_exit_code_of_its_task():
    seen, arguments = [], sys.argv
    argv = ["--config-name", "demo", "objective=rloo", "model.seed=5"]
    assert run(argv, lambda config: seen.append(config) or 75) == 75
    assert sys.argv is arguments
    assert (seen[0].objective.name, seen[0].rollout.stop_at_marker, seen[0].model.seed) == ("rloo", False, 5)


@pytest.mark.parametrize("option", ["--config-path", "--config-dir"])
def test_a_conf_folder_of_ones_own_finds_our_groups_and_recipes(tmp_path, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_conf").mkdir()
    text = "defaults: [demo, {override objective: vr_cli}, _self_]\nmodel: {seed: 9}\n"
    (tmp_path / "own_conf" / "mine.yaml").write_text(text)
    seen = []
    assert run(["--config-name", "mine", option, "own_conf"], lambda config: seen.append(config) or 0) == 0
    assert (seen[0].objective.name, seen[0].model.seed, seen[0].data.name) == ("vr_cli", 9, "arithmetic")


def test_a_wrong_setting_prints_one_line_and_exits_2_before_the_runner_is_loaded(capsys):
    def never(*_):
        raise AssertionError("unreachable")

    for override in ("+model.typo=1", "trainer.precision=fp16", "data=csv"):
        assert compose.run(never, ["--config-name", "demo", override], never) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith(override.lstrip("+").partition("=")[0])


def test_a_setting_that_the_task_refuses_exits_2_too(capsys):
    assert run(["--config-name", "demo", "trainer.devices=2"], lambda config: check(config, 1)) == 2
    assert capsys.readouterr().err.startswith("trainer.num_nodes * trainer.devices=2: ")


def test_without_a_runner_the_task_gets_the_same_settings():
    seen = []

    def task(config):
        seen.append(config)
        return 4

    assert compose.run(task, ["--config-name", "demo"], lambda: None) == 4
    assert seen == [load("demo")]
    assert compose.run(task, ["--config-name", "demo", "--cfg", "job"], lambda: None) == 0
    assert len(seen) == 1


def test_printing_the_config_runs_nothing_and_needs_no_missing_value(capsys):
    assert run(["--cfg", "job", "exp_manager.name=???"], lambda config: 1) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["objective"]["name"] == "jepo" and printed["kl"]["beta"] == 1e-3


def test_nemo_hydra_runner_runs_a_recipe(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from nemo.core.config import hydra_runner\n"
        "from nemo_jepo.config import compose\n"
        "def task(config):\n"
        "    print('seed', config.model.seed)\n"
        "    return 3\n"
        "sys.exit(compose.run(task, sys.argv[1:], lambda: hydra_runner))\n"
    )
    command = [sys.executable, str(program), "--config-name", "demo", "++model.seed=7"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(CONF.parent)}, cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "seed 7" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["program.py"]


def test_reading_settings_imports_neither_torch_nor_nemo():
    program = (
        "import sys, nemo_jepo.config.compose; print(sorted({'torch', 'nemo', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=CONF.parent)
    assert done.stdout == "[]\n", done.stderr
