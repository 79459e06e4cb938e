"""A model by its name on the hub: what is a name, what is downloaded, which commit a run keeps, and what is said."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from nemo_jepo import cli
from nemo_jepo.config import compose
from nemo_jepo.config.compose import to_yaml
from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.hub import folder_of, is_hub_name, is_model, require_here
from nemo_jepo.config.schema import Config, PretrainedConfig, TokenizerConfig
from nemo_jepo.config.sources import with_commits, with_folders
from nemo_jepo.tools.doctor.findings import BLOCKER, OK
from nemo_jepo.tools.doctor.run import count_parameters, look_up

KEY = "pretrained_checkpoint.restore_from_path"
IN_A_REPO = [
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"),
    *("consolidated.safetensors", "pytorch_model.bin", "model.pt", "modeling_own.py", "README.md", "training_args.bin"),
    *("onnx/config.json", "onnx/model.safetensors", "original/tokenizer.model"),
]


class Hub:
    """In the place of `snapshot_download`: a cache with one model. `error`: raised instead."""

    def __init__(self, cache: Path) -> None:
        self.cache, self.commit, self.files = cache, "a" * 40, IN_A_REPO
        self.error: Exception | None = None
        self.asked: list[tuple[str, str | None]] = []

    def __call__(self, repo, *, revision, **patterns) -> str:
        self.asked.append((repo, revision))
        if self.error is not None:
            raise self.error
        is_commit = revision is not None and len(revision) == 40
        folder = self.cache / "snapshots" / (revision if is_commit else self.commit)
        folder.mkdir(parents=True, exist_ok=True)
        for name in filter_repo_objects(self.files, **patterns):
            (folder / name).write_text("{}")
        return str(folder)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    fake = Hub(tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    return fake


@pytest.mark.parametrize("name", ["lab/tiny", "Qwen/Qwen2.5-0.5B-Instruct", "lab/tiny@v1.0", "a_b/c@refs/pr/1"])
def test_a_name_has_an_owner_and_maybe_a_revision(name):
    assert is_hub_name(name) and is_model(name)


@pytest.mark.parametrize("path", ["tiny", "/lab/tiny", "./lab/tiny", "../tiny", "a/b/c", "lab/tiny@", "lab/ti ny", ""])
def test_anything_else_is_a_path_that_must_be_a_folder(path, tmp_path):
    assert not is_hub_name(path)
    if path:
        assert not is_model(path)
    with pytest.raises(ConfigError, match=f"^{KEY}='.*absent': must be a folder that exists, or owner/name"):
        compose.resolve(compose.compose("jepo", [f"{KEY}={tmp_path}/absent"]))


def test_what_lies_under_that_path_comes_first(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lab" / "tiny").mkdir(parents=True)
    assert folder_of("model", "lab/tiny") == "lab/tiny" and hub.asked == []
    (tmp_path / "lab" / "tiny.gguf").write_text("")
    with pytest.raises(ConfigError, match="a .gguf file goes through `nemo-jepo import` first"):
        compose.resolve(compose.compose("jepo", [f"{KEY}=lab/tiny.gguf"]))


def test_configs_and_tokenizers_are_downloaded_then_safetensors_and_nothing_else(hub):
    folder = Path(folder_of(KEY, "lab/tiny@v1"))
    assert hub.asked == [("lab/tiny", "v1")]
    small = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {path.name for path in folder.iterdir()} == small
    assert folder_of(KEY, "lab/tiny", weights=True) == str(folder)
    assert {path.name for path in folder.iterdir()} == small | set(IN_A_REPO[5:8])


def response(status: int):
    import httpx2

    return httpx2.Response(status, request=httpx2.Request("GET", "http://hub"))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            lambda: errors.RepositoryNotFoundError("404", response=response(404)),
            "is no folder here, and the hub has no",
        ),
        (lambda: errors.GatedRepoError("403", response=response(403)), "Accept them on the hub, and set HF_TOKEN"),
        (lambda: errors.RevisionNotFoundError("404", response=response(404)), "no such revision of it. Give a branch"),
        (
            lambda: errors.LocalEntryNotFoundError("offline"),
            "and HF_HUB_OFFLINE is set. Check the name, or run `hf down",
        ),
        (lambda: OSError("No space left\non device"), r"cannot be downloaded \(No space left\)"),
    ],
)
def test_every_fault_of_the_hub_is_one_line(error, line, hub):
    hub.error = error()
    with pytest.raises(ConfigError, match=rf"^{KEY}='lab/tiny': .*{line}") as caught:
        folder_of(KEY, "lab/tiny")
    assert "\n" not in str(caught.value)


def test_a_model_without_safetensors_is_refused(hub):
    hub.files = ["config.json", "tokenizer.json", "pytorch_model.bin"]
    with pytest.raises(ConfigError, match="has no model.*safetensors on the hub, and nothing else is read"):
        folder_of(KEY, "lab/tiny", weights=True)
    hub.files, hub.commit = ["model.Q4_K_M.gguf"], "b" * 40
    with pytest.raises(ConfigError, match="has no config.json and no tokenizer on the hub"):
        folder_of(KEY, "lab/tiny")


def settings(model: str | None, tokenizer: str | None = None) -> Config:
    return replace(
        compose.resolve(compose.compose("demo")),
        pretrained_checkpoint=PretrainedConfig(restore_from_path=model),
        tokenizer=TokenizerConfig(path=tokenizer),
    )


def models(config: Config) -> tuple[str | None, str | None]:
    return config.pretrained_checkpoint.restore_from_path, config.tokenizer.path


def test_a_run_that_goes_on_keeps_the_commit_that_it_began_with(tmp_path, hub):
    typed = settings("lab/tiny", "lab/words@v2")
    first = with_commits(typed, tmp_path, has_saved=False)
    assert models(first) == (f"lab/tiny@{'a' * 40}", f"lab/words@{'a' * 40}")
    (tmp_path / "config.yaml").write_text(to_yaml(first))
    hub.commit = "b" * 40  # the branch moves
    assert (
        with_commits(settings("lab/tiny"), tmp_path, has_saved=True).pretrained_checkpoint
        == first.pretrained_checkpoint
    )
    with pytest.raises(ConfigError, match=f"is lab/words@{'b' * 40} now, and the run began with lab/words@{'a' * 40}"):
        with_commits(typed, tmp_path, has_saved=True)
    assert models(with_commits(typed, tmp_path, has_saved=False))[0] == f"lab/tiny@{'b' * 40}"  # nothing was saved yet
    apart = replace(settings("lab/tiny"), exp_manager=replace(typed.exp_manager, resume_if_exists=False))
    assert models(with_commits(apart, tmp_path, has_saved=True))[0] == f"lab/tiny@{'b' * 40}"  # evaluate --model
    assert models(with_commits(settings("lab/other"), tmp_path, has_saved=True))[0] == f"lab/other@{'b' * 40}"
    assert models(with_folders(first)) == (str(hub.cache / "snapshots" / ("a" * 40)),) * 2


def test_settings_without_a_name_stay_as_they_are(tmp_path, hub):
    for config in (settings(None), settings(str(tmp_path), str(tmp_path))):
        assert with_commits(config, tmp_path, has_saved=True) == with_folders(config) == config
    assert hub.asked == []


def test_a_folder_that_another_node_downloaded_must_be_here(tmp_path):
    assert require_here(KEY, str(tmp_path)) == str(tmp_path)
    with pytest.raises(ConfigError, match=f"{os.uname().nodename} does not have it. Set HF_HOME to a folder that all"):
        require_here(KEY, str(tmp_path / "elsewhere"))


SHAPE = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 100}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True, "head_dim": 4}


def test_plan_needs_no_weights(tmp_path, capsys, monkeypatch, hub):
    folder = Path(folder_of(KEY, "lab/tiny"))
    (folder / "config.json").write_text(json.dumps(SHAPE))
    monkeypatch.setattr(hub, "files", [])
    asked = ["plan", "--json", "--config-name", "demo", "model.hf_config=null", f"{KEY}=lab/tiny"]
    assert cli.main(asked) == 0
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12 + 2 * 8
    assert json.loads(capsys.readouterr().out)["parameters"] == 100 * 8 + 2 * layer + 8
    hub.error = errors.LocalEntryNotFoundError("offline")
    assert cli.main(asked) == 2
    assert capsys.readouterr().err.startswith(f"{KEY}='lab/tiny': is no folder here")


def test_doctor_looks_a_name_up_and_leaves_the_weights_to_the_run(hub):
    config = settings("lab/tiny")
    config = replace(config, model=replace(config.model, hf_config=None))
    folder = Path(folder_of(KEY, "lab/tiny"))
    (folder / "config.json").write_text(json.dumps(SHAPE))
    hub.files = []
    local, (finding,) = look_up(config)
    assert local is not None and finding.level == OK and "downloads the weights" in finding.text
    count, (finding,) = count_parameters(local, has_weights=False)
    assert count == 100 * 8 + 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12 + 2 * 8) + 8 and finding.level == OK
    hub.files = IN_A_REPO[1:]
    assert look_up(config, weights=True)[0] == local and (folder / IN_A_REPO[5]).exists()  # doctor --sample
    hub.error = errors.LocalEntryNotFoundError("offline")
    assert look_up(config)[0] is None and look_up(config)[1][0].level == BLOCKER
    assert count_parameters(config) == (None, [])
    assert look_up(settings(None)) == (settings(None), [])
