"""Settings that no run can have: numbers, names, paths and shapes, each answered by its key in one line."""

import pytest

from nemo_jepo.actor.model import load_hf_config
from nemo_jepo.config import compose
from nemo_jepo.config.errors import ConfigError
from tests.unit.test_settings import error_of

FLOATS = [key for key, kind in compose.KEYS.items() if "float" in str(kind) and "list" not in str(kind)]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_every_float_is_finite(value):
    assert len(FLOATS) > 25
    for key in FLOATS:
        assert error_of(f"{key}={value}").startswith(f"{key}={value}: must be ")
    assert error_of(f"model.optim.betas=[0.9,{value}]").startswith("model.optim.betas=")
    assert (
        error_of(f"++data.task_args.a=[{value}]")
        == f"data.task_args.a={value}: must be a finite number. Give a number."
    )


@pytest.mark.parametrize(
    ("override", "beginning"),
    [
        (f"model.seed={10**400}", "model.seed=1000"),
        (f"model.seed={'9' * 5000}", "setting='model.seed=999"),
        ("exp_manager.name=", "exp_manager.name='': must be the name of a folder inside exp_manager.exp_dir"),
        ("exp_manager.name=.", "exp_manager.name='.': must be the name of a folder inside"),
        ("exp_manager.name=/a", "exp_manager.name='/a': must be the name of a folder inside"),
        ("exp_manager.name=a/../../b", "exp_manager.name='a/../../b': must be the name of a folder inside"),
        (f"exp_manager.name={'a' * 256}", "exp_manager.name='aaa"),
        (f"exp_manager.exp_dir={'a/' * 2000}", "exp_manager.exp_dir='a/a"),
        (f"data.train_path={'a' * 256}", "data.train_path='aaa"),
        (f"tokenizer.path={'a/' * 3000}", "tokenizer.path='a/a"),
        ("data.train_path=a\0b", "settings='data.train_path=a\\x00b': must be a text without NUL. Leave it out."),
        (
            "answer.marker=\ud800",
            "settings='answer.marker=\\ud800': must be a text, and holds half of a surrogate pair",
        ),
        ("trainer.jepo=${oc.env:PATH}", "trainer.jepo='/"),
        ("rollout.servers=${trainer}", "rollout.servers=TrainerConfig("),
        ("model.hf_config=${trainer}", "model.hf_config=TrainerConfig("),
        ("data.task_args=${model.optim.betas}", "data.task_args=[0.9, "),
        ("answer.marker=${answer.marker}", "answer.marker: Recursive interpolation detected."),
        ("data.task_args={a:" + "{a:" * 300 + "1" + "}" * 301, "setting='data.task_args={a:{a:"),
        (
            "trainer.devices=${",
            "setting='trainer.devices=${': is no override (extraneous input '{' expecting <EOF>). Write key=value",
        ),
        (
            "model.hf_config.num_attention_heads=0",
            "model.hf_config.num_attention_heads=0: must be a whole number from 1",
        ),
        ("model.hf_config.num_attention_heads=4.0", "model.hf_config.num_attention_heads=4.0: must be a whole number"),
        ("model.hf_config.num_hidden_layers=[4]", "model.hf_config.num_hidden_layers=[4]: must be a whole number"),
        ("model.hf_config.num_hidden_layers=1000000000", "model.hf_config.num_hidden_layers=1000000000: must be"),
        (
            "model.hf_config.num_key_value_heads=3",
            "model.hf_config.num_key_value_heads=3: must divide num_attention_heads",
        ),
        (
            "++model.hf_config.tie_word_embeddings='no'",
            "model.hf_config.tie_word_embeddings='no': must be true or false",
        ),
        ("model.hf_config.intermediate_size=null", "model.hf_config=['model_type'"),
    ],
)
def test_a_setting_that_no_run_can_have_is_named(override, beginning):
    assert error_of(override).startswith(beginning)


@pytest.mark.parametrize(
    "argv",
    [["--no-such"], ["--cfg=x"], ["--config-name"], ["--cfg=hydra", "--package=no.such"], ["--experimental-rerun=x"]],
)
def test_a_wrong_option_is_one_line(argv):
    with pytest.raises(ConfigError) as caught:
        compose.read_command_line(argv)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("changes", "beginning"),
    [
        ({"layer_types": ["full_attention"] * 9}, "model.hf_config={"),
        ({"torch_dtype": "__class__"}, "model.hf_config={"),
        ({"cls": 1}, "model.hf_config={"),
        ({"rope_scaling": [1]}, "model.hf_config={"),
        ({"rms_norm_eps": float("nan")}, "model.hf_config.rms_norm_eps=nan: must be a positive number"),
        ({"model_type": []}, "model.hf_config.model_type=[]: must be one of llama"),
    ],
)
def test_a_shape_that_transformers_refuses_is_one_line(changes, beginning):
    with pytest.raises(ConfigError) as caught:
        load_hf_config({"model_type": "llama"} | changes)
    assert str(caught.value).startswith(beginning) and str(caught.value).isprintable()


def test_what_a_config_says_of_code_and_of_other_files_is_not_followed(tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit(99)")
    (tmp_path / "config.9.0.0.json").write_text('{"model_type": "qwen2"}')
    hostile = '"auto_map": {"AutoConfig": "evil.Evil"}, "configuration_files": ["config.0.0.1.json"]'
    (tmp_path / "config.json").write_text(f'{{"model_type": "llama", {hostile}}}')
    assert load_hf_config(str(tmp_path)).model_type == "llama"
    (tmp_path / "config.json").write_text(f'{{"model_type": "evil", {hostile}}}')
    with pytest.raises(ConfigError, match="^model_type='evil': must be one of"):
        load_hf_config(str(tmp_path))
