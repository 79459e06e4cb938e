"""Every conf file loads and passes; every wrong setting ends in one line that names the key."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
import yaml
from omegaconf import OmegaConf

from nemo_jepo.config import compose
from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.objectives import OBJECTIVES
from nemo_jepo.config.schema import Config

CONF = Path(__file__).parents[2] / "conf"
RECIPES = sorted(path.stem for path in CONF.glob("*.yaml"))
CONF_FILES = sorted(CONF.rglob("*.yaml"))
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
        compose.check(load(name, *overrides, folder=folder), world_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- conf/


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_passes_every_check(name, needed):
    config = load(name, *needed[name])
    compose.check(config, world_size=config.trainer.num_nodes * config.trainer.devices)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_a_choice_that_passes_every_check(name):
    config = load("demo", f"objective={name}")
    assert config.objective.name == name
    compose.check(config, world_size=1)


@pytest.mark.parametrize("group", ["data", "objective", "rollout"])
def test_a_group_file_sets_the_name_it_has(group):
    for path in (CONF / group).glob("*.yaml"):
        assert getattr(load("demo", f"{group}={path.stem}"), group).name == path.stem


@pytest.mark.parametrize("path", CONF_FILES, ids=lambda path: str(path.relative_to(CONF)))
def test_conf_file_begins_by_saying_what_it_is(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    assert lines[0].startswith("# ")


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_holds_only_differences_from_the_defaults(name):
    def leaves(node, prefix=""):
        for key, value in node.items():
            yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]

    recipe = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    del recipe["defaults"], recipe["exp_manager"]
    defaults = OmegaConf.structured(Config)
    assert not [key for key, value in leaves(recipe) if OmegaConf.select(defaults, key) == value]


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
        (["objective=ppo"], "objective=ppo (in demo.yaml): no such choice. Choose one of jepo, jepo_rl, "),
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


# ---- rules of one field


@pytest.mark.parametrize(
    "override",
    [
        "trainer.num_nodes=0",
        "trainer.devices=0",
        "trainer.precision=fp16",
        "trainer.jepo.max_steps=-1",
        "trainer.jepo.max_epochs=0",
        "trainer.jepo.num_prompts_per_step=0",
        "trainer.jepo.num_generations_per_prompt=0",
        "trainer.jepo.keep_checkpoints=0",
        "trainer.jepo.val_check_interval=-1",
        "trainer.jepo.save_interval=-1",
        "trainer.jepo.log_rollouts=-1",
        "trainer.jepo.gradient_clip_val=-1",
        "model.optim.betas=[0.9]",
        "model.optim.lr=-1",
        "model.optim.sched.name=step",
        "model.optim.sched.warmup_steps=-1",
        "model.reference_policy=disk",
        "model.fp8_guard_interval=-1",
        "model.fp8_guard_ratio=-0.1",
        "model.fp8_guard_action=stop",
        "model.activations_checkpoint_granularity=some",
        "model.tensor_model_parallel_size=0",
        "model.pipeline_model_parallel_size=0",
        "model.logprob_chunk_tokens=0",
        "model.hf_config_path=/no/such",
        "data.name=csv",
        "data.on_bad_row=drop",
        "data.max_prompt_tokens=0",
        "data.max_answer_tokens=0",
        "data.num_validation_prompts=0",
        "data.prompt_template=Q",
        "data.train_path=/no/such",
        "data.validation_path=/no/such",
        "data.arithmetic.num_steps=0",
        "tokenizer.path=/no/such",
        "tokenizer.train_vocab_size=10",
        "answer.marker=' '",
        "answer.min_cot_tokens=-1",
        "rollout.name=remote",
        "rollout.max_tokens=0",
        "rollout.batch_size=0",
        "rollout.temperature=0",
        "rollout.top_p=0",
        "rollout.top_p=1.5",
        "rollout.top_k=-1",
        "rollout.max_staleness=-1",
        "rollout.servers=localhost:8000",
        "rollout.servers=[]",
        "rollout.servers=[https://a:1]",
        "rollout.vllm.num_servers=0",
        "rollout.vllm.tensor_parallel_size=0",
        "rollout.vllm.max_attempts=0",
        "rollout.vllm.max_concurrency=0",
        "rollout.vllm.request_timeout_s=-1",
        "rollout.vllm.sync_timeout_s=-1",
        "rollout.vllm.start_timeout_s=-1",
        "rollout.vllm.parity_tolerance=-1",
        "rollout.vllm.weight_transfer=rdma",
        "rollout.vllm.api_key_file=/no/such",
        "objective.name=ppo",
        "objective.rl_reduction=median",
        "objective.length_normalization=words",
        "objective.importance_sampling=token",
        "objective.sft_target=all",
        "data.arithmetic.answers=long",
        "data.arithmetic.in_words_share=1.5",
        "objective.beta_sup=-1",
        "objective.format_penalty=-1",
        "objective.importance_cap=-1",
        "advantage.std_scope=prompt",
        "advantage.clip=0",
        "kl.estimator=k4",
        "kl.beta=-1",
        "evaluation.num_generations_per_prompt=0",
        "evaluation.max_tokens=0",
        "warmup.max_steps=-1",
        "warmup.num_prompts_per_step=0",
        "warmup.sft_target=all",
        "pretrained_checkpoint.restore_from_path=/no/such",
    ],
)
def test_a_field_that_breaks_its_rule_is_named(override):
    assert error_of("demo", override).startswith(f"{override.partition('=')[0]}=")


def test_shares_of_the_warmup_corpus_add_up_to_one_at_most():
    line = error_of("demo", "data.arithmetic.right_share=0.7", "data.arithmetic.corrupted_share=0.6")
    assert line.startswith("data.arithmetic.right_share + corrupted_share=")


# ---- rules between fields, files and machines


@pytest.mark.parametrize(
    ("overrides", "world_size", "beginning"),
    [
        (["data=jsonl"], 1, "data.train_path=None: data=jsonl reads a file"),
        (["trainer.devices=2"], 1, "trainer.num_nodes * trainer.devices=2: 1 processes were started"),
        (
            ["trainer.devices=3", "model.tensor_model_parallel_size=2"],
            3,
            "model.tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size=2: must divide",
        ),
        (["trainer.devices=3"], 3, "trainer.jepo.num_prompts_per_step=32: must be a multiple of the 3 "),
        (
            ["trainer.devices=3", "trainer.jepo.num_prompts_per_step=30"],
            3,
            "warmup.num_prompts_per_step=64: must be a multiple of the 3 ",
        ),
        (["model.sequence_parallel=true"], 1, "model.sequence_parallel=True: "),
        (
            ["model.tokens_per_micro_batch=83"],
            1,
            "max(rollout.max_tokens, evaluation.max_tokens) + data.max_prompt_tokens + data.max_answer_tokens=84: "
            "a sequence must fit in a row of model.tokens_per_micro_batch=83",
        ),
        (
            ["model.tokens_per_micro_batch=84", "evaluation.max_tokens=49"],
            1,
            "max(rollout.max_tokens, evaluation.max_tokens) + data.max_prompt_tokens + data.max_answer_tokens=85: ",
        ),
        (["objective=rloo", "rollout.stop_at_marker=true"], 1, "rollout.stop_at_marker=True: objective=rloo"),
        (["objective=jepo_rl", "rollout.stop_at_marker=true"], 1, "rollout.stop_at_marker=True: objective=jepo_rl"),
        (
            ["objective=rloo", "trainer.jepo.num_generations_per_prompt=1"],
            1,
            "trainer.jepo.num_generations_per_prompt=1: ",
        ),
        (["rollout.top_p=0.9"], 1, "rollout.top_p=0.9: the embedded sampler draws from all tokens"),
        (["rollout=vllm", "rollout.top_p=0.9"], 1, "rollout.top_p=0.9: the bound is an expectation over the policy's"),
        (["rollout=vllm", "rollout.top_k=50"], 1, "rollout.top_k=50: the bound is an expectation over the policy's"),
        (["rollout=vllm", "rollout.max_staleness=1"], 1, "rollout.max_staleness=1: the samples come from older"),
        (
            ["rollout.max_staleness=1", "objective.importance_sampling=token_truncated"],
            1,
            "rollout.max_staleness=1: the embedded sampler shares its process",
        ),
        (
            ["rollout=vllm", "trainer.num_nodes=2"],
            2,
            "rollout.servers='auto': starts servers on the trainer's own node",
        ),
        (["objective=vr_cli", "objective.beta_sup=1"], 1, "objective.beta_sup=1.0: objective=vr_cli"),
        (
            ["trainer.jepo.max_steps=0", "warmup.max_steps=0"],
            1,
            "trainer.jepo.max_steps=0: makes the warm-up alone, and warmup.max_steps is 0 as well",
        ),
        (
            ["objective.importance_sampling=token_truncated", "objective.importance_cap=0.5"],
            1,
            "objective.importance_cap=0.5: ",
        ),
        (
            ["model.hf_config=null"],
            1,
            "model.hf_config, model.hf_config_path, pretrained_checkpoint.restore_from_path=[]: exactly one",
        ),
        (
            ["model.hf_config_path=."],
            1,
            "model.hf_config, model.hf_config_path, pretrained_checkpoint.restore_from_path="
            "['model.hf_config', 'model.hf_config_path']: exactly one",
        ),
        (
            ["trainer.devices=4", "model.tensor_model_parallel_size=4"],
            4,
            "model.tensor_model_parallel_size=4: must divide num_key_value_heads=2",
        ),
        (
            ["trainer.devices=8", "model.pipeline_model_parallel_size=8"],
            8,
            "model.pipeline_model_parallel_size=8: 4 of num_hidden_layers=4 are left for 8 equal stages",
        ),
        (
            [
                "trainer.devices=2",
                "model.tensor_model_parallel_size=2",
                "model.sequence_parallel=true",
                "model.tokens_per_micro_batch=2047",
            ],
            2,
            "model.tokens_per_micro_batch=2047: ",
        ),
    ],
)
def test_a_broken_rule_between_settings_names_its_key(overrides, world_size, beginning):
    assert error_of("demo", *overrides, world_size=world_size).startswith(beginning)


def test_truncated_sampling_can_be_accepted_and_a_verifiable_reward_needs_no_permission():
    vllm = ("rollout=vllm", "rollout.top_p=0.9", "rollout.top_k=50")
    compose.check(load("demo", *vllm, "rollout.allow_truncated_sampling=true"), world_size=1)
    compose.check(load("demo", *vllm, "objective=rloo", "rollout.stop_at_marker=false"), world_size=1)


def test_servers_are_auto_one_address_or_several():
    assert load("demo", "rollout=vllm").rollout.server_urls() is None
    assert load("demo", "rollout.servers=http://10.0.0.1:8000/").rollout.server_urls() == ("http://10.0.0.1:8000",)
    both = load("demo", "rollout.servers=[http://a:1,http://b:2]").rollout.server_urls()
    assert both == ("http://a:1", "http://b:2")


def test_the_longest_sequence_may_fill_a_row_exactly():
    compose.check(load("demo", "model.tokens_per_micro_batch=84"), world_size=1)


def test_jepo_with_one_generation_keeps_its_supervised_term():
    compose.check(load("demo", "trainer.jepo.num_generations_per_prompt=1"), world_size=1)


def test_the_shape_of_a_hugging_face_folder_is_checked_against_the_layout(tmp_path, needed):
    layout = ["trainer.devices=3", "model.tensor_model_parallel_size=3"]
    line = error_of("jepo", *needed["jepo"], *layout, world_size=3)
    assert line.startswith("model.tensor_model_parallel_size=3: must divide num_attention_heads=4")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    line = error_of("jepo", *needed["jepo"])
    assert line.startswith("pretrained_checkpoint.restore_from_path=") and "intermediate_size" in line


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
    assert run(["--config-name", "demo", "trainer.devices=2"], lambda config: compose.check(config, 1)) == 2
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
