"""Every conf file loads and passes; wrong keys, files and command lines end in one line that says what to change."""

import json
from pathlib import Path

import pytest
import yaml

from nemo_jepo.config import compose
from nemo_jepo.config.check import check
from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.keys import nearest_key
from nemo_jepo.config.objectives import OBJECTIVES, RENAMED_OBJECTIVES
from nemo_jepo.data.arithmetic_judgement import PROMPT

CONF = Path(__file__).parents[2] / "conf"
RECIPES = sorted(path.stem for path in CONF.glob("*.yaml"))
SHAPE = {"model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 320}


@pytest.fixture
def needed(tmp_path):
    """Overrides that a recipe leaves to its user: a data file, a model folder."""
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    model = f"pretrained_checkpoint.restore_from_path={tmp_path}"
    return {
        "demo": [],
        "mini": [],
        "mini_verifiable": [],
        "mini_lengths": [],
        "mini_self_verification": [],
        "mini_semi": [],
        "mini_collapse": [],
        "mini_judge": [],
        "mini_judged": [],
        "mini_unverifiable": [],
        "jepo_tiny": [],
        "gsm8k_small": [f"data.train_path={tmp_path}/rows.jsonl"],
        "proofnet_small": [f"data.train_path={tmp_path}/rows.jsonl"],
        "jepo": [f"data.train_path={tmp_path}/rows.jsonl", model],
        "smollm2": [f"data.train_path={tmp_path}/rows.jsonl", model],
        "smollm2_chain_sum": [model],
        "smollm2_letter_counting": [model],
        "smollm2_gsm8k": [f"data.train_path={tmp_path}/rows.jsonl", model],
        "smollm2_proofnet": [f"data.train_path={tmp_path}/rows.jsonl", model],
        "jepo_8b": [f"data.train_path={tmp_path}/rows.jsonl"],
        "jepo_8b_fp8": [f"data.train_path={tmp_path}/rows.jsonl"],
        "jepo_8b_async": [f"data.train_path={tmp_path}/rows.jsonl"],
        "jepo_8b_colocated": [f"data.train_path={tmp_path}/rows.jsonl"],
        "jepo_numina": [f"data.train_path={tmp_path}/rows.jsonl"],
        "jepo_numina_proof": [f"data.train_path={tmp_path}/rows.jsonl"],
        "jepo_70b": [f"data.train_path={tmp_path}/rows.jsonl", "rollout.servers=[http://node:8000]"],
        "jepo_70b_fp8": [f"data.train_path={tmp_path}/rows.jsonl", "rollout.servers=[http://node:8000]"],
        "jepo_70b_async": [f"data.train_path={tmp_path}/rows.jsonl", "rollout.servers=[http://node:8000]"],
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


def test_a_judge_is_asked_what_it_was_trained_on():
    judge = load("mini_judged").evaluation.judge
    assert judge.prompt == PROMPT
    assert (judge.correct, judge.wrong) == ("The final answer is correct", "The final answer is wrong")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_a_choice_that_passes_every_check(name):
    config = load("demo", f"objective={name}")
    assert config.objective.name == name
    check(config, world_size=1)


@pytest.mark.parametrize("group", ["data", "objective", "rollout"])
def test_a_group_file_sets_the_name_it_has(group):
    for path in (CONF / group).glob("*.yaml"):
        name = getattr(load("demo", f"{group}={path.stem}"), group).name
        assert RENAMED_OBJECTIVES.get(path.stem, path.stem) in (name, f"{name}_paper")


def test_an_objective_of_an_earlier_name_is_read_and_said(capsys):
    assert load("demo", "objective=prob_pg").objective.name == "verifree"
    assert capsys.readouterr().out.startswith("objective=prob_pg is called verifree now; ")


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
    assert nearest_key(key) == nearest


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
        (["objective=ppo"], "objective=ppo (in demo.yaml): no such choice. Choose one of avg_logprob, dpo, gm, jepo, "),
        (["exp_manager.name=???"], "exp_manager.name: has no default. Add exp_manager.name="),
        (["model=1"], "model=1: "),
        (["model.seed"], "setting='model.seed': is no override (missing EQUAL at '<EOF>')"),
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


def test_evaluate_takes_a_model_in_the_place_of_a_run_and_needs_held_out_data_alone(tmp_path):
    """The recipe's own shape and tokenizer give way, also to a folder whose name Hydra would read as something else."""
    folder = tmp_path / "it's a model, {x: 1}"
    folder.mkdir()
    shape = {"num_attention_heads": 2, "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8}
    (folder / "config.json").write_text(json.dumps(shape))
    (tmp_path / "held_out.jsonl").write_text("")
    data = f"data.validation_path={tmp_path}/held_out.jsonl"
    text = "defaults: [demo, {override data: jsonl}, _self_]\nexp_manager: {name: '???'}\n"
    (tmp_path / "own.yaml").write_text(text)
    own = ["--config-path", str(tmp_path), "--config-name", "own"]
    of_a_run = ["model.hf_config.hidden_size=32", "model.seed=3"]
    config = compose.read_command_line(["--model", str(folder), *own, data, *of_a_run], trains=False)
    assert config is not None
    assert config.pretrained_checkpoint.restore_from_path == str(folder)
    assert (config.model.hf_config, config.tokenizer.path, config.data.train_path) == (None, None, None)
    assert (config.model.seed, config.exp_manager.resume_if_exists) == (3, False)

    with pytest.raises(ConfigError, match="^data.validation_path=None: evaluate reads it. Add"):
        compose.read_command_line(["--model", str(folder), *own], trains=False)
    with pytest.raises(ConfigError, match="^--model=.*: is an option of evaluate.*Use pretrained_checkpoint"):
        compose.read_command_line(["--model", str(folder)])
    for arguments in (["--model"], ["--model", data], ["--model", "--config-name", "demo"]):
        with pytest.raises(ConfigError, match="^--model=.*: must name a model. Write --model MODEL."):
            compose.read_command_line(arguments, trains=False)


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


@pytest.mark.parametrize("option", ["--config-path", "--config-dir"])
def test_a_conf_folder_of_ones_own_finds_our_groups_and_recipes(tmp_path, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_conf").mkdir()
    text = "defaults: [demo, {override objective: vr_cli}, _self_]\nmodel: {seed: 9}\n"
    (tmp_path / "own_conf" / "mine.yaml").write_text(text)
    config = compose.read_command_line(["--config-name", "mine", option, "own_conf"])
    assert config is not None
    assert (config.objective.name, config.model.seed, config.data.name) == ("vr_cli", 9, "arithmetic")
    assert [path.name for path in tmp_path.iterdir()] == ["own_conf"]


def test_hydra_answers_what_it_is_asked_about_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert compose.read_command_line(["--cfg", "hydra", "--package", "hydra.job"]) is None
    assert "config_name: jepo" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
