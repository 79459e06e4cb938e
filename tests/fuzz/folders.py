"""Folders of a model, and data files, in whose places stand links, FIFOs, devices, folders or files of any size."""

import json
import os
import shutil
from pathlib import Path

from hypothesis import strategies as st

from nemo_jepo.config.errors import ConfigError, DataError
from nemo_jepo.config.schema import AnswerConfig, DataConfig, ModelConfig
from tests.fuzz import models, rows
from tests.fuzz.runner import Campaign

NAMES = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "additional_chat_templates",
    "rows.jsonl",
    "rows.parquet",
]
KINDS = [
    "whole",
    "missing",
    "empty",
    "folder",
    "fifo",
    "link to a fifo",
    "link to /dev/zero",
    "link to /dev/stdin",
    "link to itself",
    "link to nothing",
    "link outside",
    "link inside",
    "link to a folder",
    "link of the hub",
    "link over the hub",
    "huge",
    "no permission",
]


def whole_files() -> dict[str, bytes]:
    """The files of a whole folder, data among them."""
    config, header = json.dumps(models.CONFIGS[0]).encode(), models.packed(*models.weights())
    good = json.dumps(rows.GOOD).encode() + b"\n"
    index = json.dumps({"weight_map": dict.fromkeys(models.weights()[0], "model.safetensors")}).encode()
    return models.tokenizer_files()[0] | {
        "config.json": config,
        "model.safetensors": header,
        "model.safetensors.index.json": index.replace(b'"__metadata__": "model.safetensors", ', b""),
        "rows.jsonl": good,
        "rows.parquet": rows.parquet_files()[0],
        "chat_template.jinja": models.TEMPLATE.encode(),
    }


def lay(home: Path, content: bytes, name: str, kind: str) -> None:
    """Put something of that kind at home/name; what it links to lies at fixed places around."""
    path, outside, blobs = home / name, home.parents[2] / "outside", home.parents[1] / "blobs"
    for folder in (outside, blobs):
        folder.mkdir(exist_ok=True)
    targets = {
        "link to /dev/zero": "/dev/zero",
        "link to /dev/stdin": "/dev/stdin",
        "link to itself": name,
        "link to nothing": "nothing",
        "link to a folder": ".",
        "link outside": f"../../../outside/{name}",
        "link inside": f"kept_{name}",
        "link of the hub": f"../../blobs/{name}",
        "link over the hub": f"../../../models--other--name/blobs/{name}",
        "link to a fifo": "../../../outside/fifo",
    }
    if kind in ("whole", "no permission"):
        path.write_bytes(content)
        path.chmod(0o600 if kind == "whole" else 0)
    elif kind in ("empty", "huge"):
        path.touch()
        os.truncate(path, 0 if kind == "empty" else 2**40)
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind != "missing":
        path.symlink_to(targets[kind])
    fifo = outside / "fifo"
    if not fifo.exists():
        os.mkfifo(fifo)
    holder = {"link outside": outside, "link of the hub": blobs, "link inside": home}.get(kind)
    if holder is not None:
        (holder / (f"kept_{name}" if holder == home else name)).write_bytes(content)


def read(layout: dict[str, str]) -> None:
    """Lay out a snapshot of the hub's cache, and read it as every command does."""
    top = models.fresh("layout")
    home = top / "models--owner--name" / "snapshots" / "0123"
    home.mkdir(parents=True)
    whole = whole_files()
    for name, kind in ({name: "whole" for name in whole} | layout).items():
        lay(home, whole.get(name, b"{}"), name, kind)
    try:
        _read_all(home, whole, layout)
    finally:
        shutil.rmtree(top, ignore_errors=True)


def _read_all(home: Path, whole: dict[str, bytes], layout: dict[str, str]) -> None:
    from nemo_jepo.actor.model import load_hf_config
    from nemo_jepo.actor.weights.load import open_source
    from nemo_jepo.config.shapes import model_shape
    from nemo_jepo.data.dataset import load_prompts
    from nemo_jepo.data.tokenizer import load_tokenizer

    steps = {
        "shape": lambda: model_shape(ModelConfig(), str(home)),
        "tokenizer": lambda: load_tokenizer(str(home), use_chat_template=True),
        "weights": lambda: open_source(load_hf_config(str(home)), str(home), 0).read("model.norm.weight").sum().item(),
        "jsonl": lambda: load_prompts(
            DataConfig(train_path=str(home / "rows.jsonl")), "train", rows.tokenizer(), AnswerConfig()
        ),
        "parquet": lambda: load_prompts(
            DataConfig(train_path=str(home / "rows.parquet")), "train", rows.tokenizer(), AnswerConfig()
        ),
    }
    faults: list[Exception] = []
    for step in steps.values():
        try:
            step()
        except (ConfigError, DataError) as error:
            faults.append(error)
    if all(kind in ("whole", "link inside", "link of the hub") for kind in layout.values()):
        assert not faults or "additional_chat_templates" in layout, faults
    if faults:
        raise faults[-1]


def prepare() -> None:
    """Make what the folders are filled with."""
    rows.prepare()
    whole_files()


layouts = st.dictionaries(st.sampled_from(NAMES), st.sampled_from(KINDS), min_size=1, max_size=3)
FOLDER = Campaign(layouts, read, share=0.4, prepare=prepare, parse=json.loads)
