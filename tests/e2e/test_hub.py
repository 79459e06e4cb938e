"""A model by its name, with huggingface_hub's own client and a hub on this machine."""

from pathlib import Path

import pytest
import yaml

from tests.support.command_line import TINY
from tests.support.fake_hub import REPO, FakeHub
from tests.support.ranks import run_ranks
from tests.support.serving import tiny_model

pytestmark = pytest.mark.timeout(600)  # processes that import everything themselves

MODEL = "pretrained_checkpoint.restore_from_path"
SHAPELESS = [setting for setting in TINY if not setting.startswith(("model.hf_config", "tokenizer."))]


def train(hub: FakeHub, folder: Path, model: str, steps: int, ranks: int = 1) -> str:
    """A run from a name; two ranks share the model."""
    command = ["-m", "nemo_jepo.cli", "train", *SHAPELESS, "model.hf_config=null", f"{MODEL}={model}"]
    command += [f"exp_manager.exp_dir={folder}", "exp_manager.name=run", f"trainer.jepo.max_steps={steps}"]
    layout = ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true", "trainer.devices=2"]
    command += layout if ranks == 2 else []
    return run_ranks(ranks, command, timeout=400, environment=hub.environment(folder / "cache"), forked=False)


def test_the_first_rank_downloads_once_and_a_run_that_goes_on_keeps_its_commit(tmp_path):
    """Also where the branch has moved."""
    tiny_model(tmp_path / "one", "llama", tied=True, seed=1)
    (tmp_path / "one" / "pytorch_model.bin").write_text("a pickle")
    tiny_model(tmp_path / "two", "llama", tied=True, seed=2)
    with FakeHub() as hub:
        commit = hub.push(tmp_path / "one")
        train(hub, tmp_path, REPO, steps=1, ranks=2)
        files = {path.name for path in (tmp_path / "one").iterdir()} - {"pytorch_model.bin"}
        assert sorted(hub.asked) == sorted(files) and hub.asked[-1] == "model.safetensors"
        saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
        assert saved["pretrained_checkpoint"]["restore_from_path"] == f"{REPO}@{commit}"

        hub.asked.clear()
        hub.push(tmp_path / "two")
        train(hub, tmp_path, REPO, steps=2)
        assert hub.asked == []
        assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["pretrained_checkpoint"] == {
            "restore_from_path": f"{REPO}@{commit}"
        }
